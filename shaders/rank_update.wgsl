// C = A + S·M with sums in Real: a combination of the few long rows of M, added to A or alone.
//
//   A, C: rows × cols, f32      S: rows × inner, Real      M: inner × cols, f32; all row-major
//
// Work: (job, tile row, tile column). A workgroup makes one 16 × 16 tile of C, a thread one element.
// Bindings: 3 A (anything where `add` is 0), 4 S, 5 M, 6 C.

#import params
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

const TILE: u32 = 16u;

var<workgroup> s_tile: array<Real, TILE * TILE>;
var<workgroup> m_tile: array<f32, TILE * TILE>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    if (!has_work(workgroup)) {
        return;
    }
    let work = work_table[work_index(workgroup)];
    let job = jobs[work.x];
    let i = t / TILE;
    let k = t % TILE;
    let row = work.y * TILE + i;
    let column = work.z * TILE + k;
    let inside = row < job.rows && column < job.cols;
    var sum = REAL_ZERO;
    if (inside && job.add != 0u) {
        sum = real(a[job.a + row * job.cols + column]);
    }
    for (var first = 0u; first < job.inner; first += TILE) {
        var s_value = REAL_ZERO;
        if (row < job.rows && first + k < job.inner) {
            s_value = s[job.s + row * job.inner + first + k];
        }
        var m_value = 0.0;
        if (first + i < job.inner && column < job.cols) {
            m_value = m[job.m + (first + i) * job.cols + column];
        }
        workgroupBarrier();
        s_tile[t] = s_value;
        m_tile[t] = m_value;
        workgroupBarrier();
        for (var d = 0u; d < TILE; d++) {
            sum = real_mul_add(s_tile[i * TILE + d], real(m_tile[d * TILE + k]), sum);
        }
    }
    if (inside) {
        c[job.c + row * job.cols + column] = real_to_f32(sum);
    }
}
