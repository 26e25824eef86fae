// C = A + S·M with sums in Real: a combination of the few long rows of M, added to A or alone.
//
//   A, C: rows × cols, f32      S: rows × inner, Real      M: inner × cols, f32; all row-major
//
// Work and tiles: see shared/product.wgsl; a thread has two rows that are 16 apart. Bindings: 3 A (anything where `add` is
// 0), 4 S, 5 M, 6 C.

#import shared/params
#import real

struct Job {
    add: u32,   // 0: C = S·M
    a: u32,     // first element
    s: u32,     // first element
    m: u32,     // first element
    c: u32,     // first element
    rows: u32,
    inner: u32,
    cols: u32,
}

@group(0) @binding(3) var<storage, read> a: array<f32>;
@group(0) @binding(4) var<storage, read> s: array<Real>;
@group(0) @binding(5) var<storage, read> m: array<f32>;
@group(0) @binding(6) var<storage, read_write> c: array<f32>;

alias Left = Real;
alias Right = f32;
const LEFT_ZERO: Left = REAL_ZERO;
const RIGHT_ZERO: Right = 0.0;

const ROWS: u32 = 32u;
const ROW_STEP: u32 = 1u;
const ROW_APART: u32 = 16u;
const ROW_STRIDE: u32 = DEPTH;
const DEPTH_STRIDE: u32 = 1u;
const LEFT_LEN: u32 = ROWS * ROW_STRIDE;

fn left(job: Job, row: u32, k: u32) -> Left {
    return s[job.s + row * job.inner + k];
}

fn right(job: Job, k: u32, column: u32) -> Right {
    return m[job.m + k * job.cols + column];
}

fn left_real(value: Left) -> Real {
    return value;
}

fn right_real(value: Right) -> Real {
    return real(value);
}

fn store(job: Job, row: u32, column: u32, sum: Real) {
    if (row >= job.rows || column >= job.cols) {
        return;
    }
    let e = row * job.cols + column;
    if (job.add != 0u) {
        c[job.c + e] = real_to_f32(real_add(real(a[job.a + e]), sum));
    } else {
        c[job.c + e] = real_to_f32(sum);
    }
}

#import shared/product
