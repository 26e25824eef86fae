// C = B·R with sums in Real: the merged B from the concatenated one and the router.
//
//   B: rows × inner, f32      R: inner × cols, Real      C: rows × cols, f32; all row-major
//
// Work and tiles: see shared/product.wgsl; a thread has 4 neighbouring rows. Bindings: 3 B, 4 R, 5 C.

#import shared/params
#import real

struct Job {
    b: u32,     // first element
    r: u32,     // first element
    c: u32,     // first element
    rows: u32,
    inner: u32,
    cols: u32,
}

@group(0) @binding(3) var<storage, read> b: array<f32>;
@group(0) @binding(4) var<storage, read> r: array<Real>;
@group(0) @binding(5) var<storage, read_write> c: array<f32>;

alias Left = f32;
alias Right = Real;
const LEFT_ZERO: Left = 0.0;
const RIGHT_ZERO: Right = REAL_ZERO;

const ROWS: u32 = 64u;
const ROW_STEP: u32 = 4u;
const ROW_APART: u32 = 1u;
const ROW_STRIDE: u32 = 1u;
// Padded, so that the 16 values of a row of B, which come together, do not meet in a bank.
const DEPTH_STRIDE: u32 = ROWS + 4u;
const LEFT_LEN: u32 = DEPTH * DEPTH_STRIDE;

fn left(job: Job, row: u32, k: u32) -> Left {
    return b[job.b + row * job.inner + k];
}

fn right(job: Job, k: u32, column: u32) -> Right {
    return r[job.r + k * job.cols + column];
}

fn left_real(value: Left) -> Real {
    return real(value);
}

fn right_real(value: Right) -> Real {
    return value;
}

fn store(job: Job, row: u32, column: u32, value: Real) {
    if (row < job.rows && column < job.cols) {
        c[job.c + row * job.cols + column] = real_to_f32(value);
    }
}

#import shared/product
