// C = A + S·M with sums in Real: a combination of the few long rows of M, added to A or alone.
//
//   A, C: rows × cols, f32      S: rows × inner, Real      M: inner × cols, f32; all row-major
//
// Work: (job, tile row, tile column). A workgroup makes one 32 × 64 tile of C, a thread eight elements of it: in rows i
// and i + 16, columns j, j + 16, j + 32 and j + 48. Bindings: 3 A (anything where `add` is 0), 4 S, 5 M, 6 C.

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

const ROWS: u32 = 32u;
const COLUMNS: u32 = 64u;
const DEPTH: u32 = 16u;

var<workgroup> s_tile: array<Real, ROWS * DEPTH>;
var<workgroup> m_tile: array<f32, DEPTH * COLUMNS>;

fn load_s(job: Job, row: u32, d: u32) -> Real {
    if (row >= job.rows || d >= job.inner) {
        return REAL_ZERO;
    }
    return s[job.s + row * job.inner + d];
}

fn load_m(job: Job, d: u32, column: u32) -> f32 {
    if (d >= job.inner || column >= job.cols) {
        return 0.0;
    }
    return m[job.m + d * job.cols + column];
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

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    if (!has_work(workgroup)) {
        return;
    }
    let work = work_table[work_index(workgroup)];
    let job = jobs[work.x];
    let i = t / 16u;
    let j = t % 16u;
    let row = work.y * ROWS + i;
    let column = work.z * COLUMNS + j;
    var sum00 = REAL_ZERO;
    var sum01 = REAL_ZERO;
    var sum02 = REAL_ZERO;
    var sum03 = REAL_ZERO;
    var sum10 = REAL_ZERO;
    var sum11 = REAL_ZERO;
    var sum12 = REAL_ZERO;
    var sum13 = REAL_ZERO;
    for (var first = 0u; first < job.inner; first += DEPTH) {
        let s0 = load_s(job, row, first + j);
        let s1 = load_s(job, row + 16u, first + j);
        let m0 = load_m(job, first + i, column);
        let m1 = load_m(job, first + i, column + 16u);
        let m2 = load_m(job, first + i, column + 32u);
        let m3 = load_m(job, first + i, column + 48u);
        workgroupBarrier();
        s_tile[i * DEPTH + j] = s0;
        s_tile[(i + 16u) * DEPTH + j] = s1;
        m_tile[i * COLUMNS + j] = m0;
        m_tile[i * COLUMNS + j + 16u] = m1;
        m_tile[i * COLUMNS + j + 32u] = m2;
        m_tile[i * COLUMNS + j + 48u] = m3;
        workgroupBarrier();
        for (var d = 0u; d < DEPTH; d++) {
            let x0 = s_tile[i * DEPTH + d];
            let x1 = s_tile[(i + 16u) * DEPTH + d];
            let y0 = real(m_tile[d * COLUMNS + j]);
            let y1 = real(m_tile[d * COLUMNS + j + 16u]);
            let y2 = real(m_tile[d * COLUMNS + j + 32u]);
            let y3 = real(m_tile[d * COLUMNS + j + 48u]);
            sum00 = real_mul_add(x0, y0, sum00);
            sum01 = real_mul_add(x0, y1, sum01);
            sum02 = real_mul_add(x0, y2, sum02);
            sum03 = real_mul_add(x0, y3, sum03);
            sum10 = real_mul_add(x1, y0, sum10);
            sum11 = real_mul_add(x1, y1, sum11);
            sum12 = real_mul_add(x1, y2, sum12);
            sum13 = real_mul_add(x1, y3, sum13);
        }
    }
    store(job, row, column, sum00);
    store(job, row, column + 16u, sum01);
    store(job, row, column + 32u, sum02);
    store(job, row, column + 48u, sum03);
    store(job, row + 16u, column, sum10);
    store(job, row + 16u, column + 16u, sum11);
    store(job, row + 16u, column + 32u, sum12);
    store(job, row + 16u, column + 48u, sum13);
}
