// C = B·R with sums in Real: the merged B from the concatenated one and the router.
//
//   B: rows × inner, f32      R: inner × cols, Real      C: rows × cols, f32; all row-major
//
// Work: (job, tile row, tile column). A workgroup makes one 16 × 16 tile of C, a thread one element.
// Bindings: 3 B, 4 R, 5 C.

#import params
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

const TILE: u32 = 16u;

var<workgroup> b_tile: array<f32, TILE * TILE>;
var<workgroup> r_tile: array<Real, TILE * TILE>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    if (!has_work(workgroup)) {
        return;
    }
    let work = work_table[work_index(workgroup)];
    let job = jobs[work.x];
    let i = t / TILE;
    let j = t % TILE;
    let row = work.y * TILE + i;
    let column = work.z * TILE + j;
    var sum = REAL_ZERO;
    for (var k = 0u; k < job.inner; k += TILE) {
        var b_value = 0.0;
        if (row < job.rows && k + j < job.inner) {
            b_value = b[job.b + row * job.inner + k + j];
        }
        var r_value = REAL_ZERO;
        if (k + i < job.inner && column < job.cols) {
            r_value = r[job.r + (k + i) * job.cols + column];
        }
        workgroupBarrier();
        b_tile[t] = b_value;
        r_tile[t] = r_value;
        workgroupBarrier();
        for (var d = 0u; d < TILE; d++) {
            sum = real_mul_add(real(b_tile[i * TILE + d]), r_tile[d * TILE + j], sum);
        }
    }
    if (row < job.rows && column < job.cols) {
        c[job.c + row * job.cols + column] = real_to_f32(sum);
    }
}
