// C = B·R with sums in Real: the merged B from the concatenated one and the router.
//
//   B: rows × inner, f32      R: inner × cols, Real      C: rows × cols, f32; all row-major
//
// Work: (job, tile row, tile column). A workgroup makes one 64 × 64 tile of C, a thread 4 neighbouring rows and 4
// columns that are 16 apart, so that neighbours read neighbouring elements of R.
// Bindings: 3 B, 4 R, 5 C.

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

const TILE: u32 = 64u;
const DEPTH: u32 = 16u;
const APART: u32 = 16u;
// Padded, so that the 16 values of a row of B, which come together, do not meet in a bank.
const B_STRIDE: u32 = TILE + 4u;

// [k][row]
var<workgroup> b_tile: array<f32, DEPTH * B_STRIDE>;
// [k][column]
var<workgroup> r_tile: array<Real, DEPTH * TILE>;

// A thread's columns of a row.
struct Quad {
    x: Real,
    y: Real,
    z: Real,
    w: Real,
}

fn add_products(sum: Quad, b_value: f32, r_values: Quad) -> Quad {
    let factor = real(b_value);
    return Quad(
        real_mul_add(factor, r_values.x, sum.x),
        real_mul_add(factor, r_values.y, sum.y),
        real_mul_add(factor, r_values.z, sum.z),
        real_mul_add(factor, r_values.w, sum.w),
    );
}

fn load_b(job: Job, row: u32, k: u32) -> f32 {
    if (row >= job.rows || k >= job.inner) {
        return 0.0;
    }
    return b[job.b + row * job.inner + k];
}

fn load_r(job: Job, k: u32, column: u32) -> Real {
    if (k >= job.inner || column >= job.cols) {
        return REAL_ZERO;
    }
    return r[job.r + k * job.cols + column];
}

fn store(job: Job, row: u32, column: u32, value: Real) {
    if (row < job.rows && column < job.cols) {
        c[job.c + row * job.cols + column] = real_to_f32(value);
    }
}

fn store_row(job: Job, row: u32, column: u32, sum: Quad) {
    store(job, row, column, sum.x);
    store(job, row, column + APART, sum.y);
    store(job, row, column + 2u * APART, sum.z);
    store(job, row, column + 3u * APART, sum.w);
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    if (!has_work(workgroup)) {
        return;
    }
    let work = work_table[work_index(workgroup)];
    let job = jobs[work.x];
    let first_row = work.y * TILE;
    let first_column = work.z * TILE;
    let i = t / 16u;
    let j = t % 16u;
    var sum0 = Quad(REAL_ZERO, REAL_ZERO, REAL_ZERO, REAL_ZERO);
    var sum1 = sum0;
    var sum2 = sum0;
    var sum3 = sum0;
    for (var k = 0u; k < job.inner; k += DEPTH) {
        // Element (i, j) of every 16 rows of B, and of every 16 columns of R.
        let b0 = load_b(job, first_row + i, k + j);
        let b1 = load_b(job, first_row + i + 16u, k + j);
        let b2 = load_b(job, first_row + i + 32u, k + j);
        let b3 = load_b(job, first_row + i + 48u, k + j);
        let r0 = load_r(job, k + i, first_column + j);
        let r1 = load_r(job, k + i, first_column + j + APART);
        let r2 = load_r(job, k + i, first_column + j + 2u * APART);
        let r3 = load_r(job, k + i, first_column + j + 3u * APART);
        workgroupBarrier();
        b_tile[j * B_STRIDE + i] = b0;
        b_tile[j * B_STRIDE + i + 16u] = b1;
        b_tile[j * B_STRIDE + i + 32u] = b2;
        b_tile[j * B_STRIDE + i + 48u] = b3;
        r_tile[i * TILE + j] = r0;
        r_tile[i * TILE + j + APART] = r1;
        r_tile[i * TILE + j + 2u * APART] = r2;
        r_tile[i * TILE + j + 3u * APART] = r3;
        workgroupBarrier();
        for (var d = 0u; d < DEPTH; d++) {
            let at = d * TILE + j;
            let r_values = Quad(r_tile[at], r_tile[at + APART], r_tile[at + 2u * APART], r_tile[at + 3u * APART]);
            let b_at = d * B_STRIDE + i * 4u;
            sum0 = add_products(sum0, b_tile[b_at], r_values);
            sum1 = add_products(sum1, b_tile[b_at + 1u], r_values);
            sum2 = add_products(sum2, b_tile[b_at + 2u], r_values);
            sum3 = add_products(sum3, b_tile[b_at + 3u], r_values);
        }
    }
    store_row(job, first_row + i * 4u, first_column + j, sum0);
    store_row(job, first_row + i * 4u + 1u, first_column + j, sum1);
    store_row(job, first_row + i * 4u + 2u, first_column + j, sum2);
    store_row(job, first_row + i * 4u + 3u, first_column + j, sum3);
}
