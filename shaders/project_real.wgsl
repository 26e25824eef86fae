// Z = X·Aᵀ with sums in Real: the twin of project.wgsl for the f64 and double-single tiers.
//
//   X: tokens × width, row-major, f32, f16 or bf16      A: rank × width, f32      Z: tokens × rank, Real
//
// Work: (job, token tile, rank tile). A workgroup makes one 16 × 16 tile of Z, a thread one element.
// Bindings: 3 X as raw words, 4 A, 5 Z.

#import params
#import words
#import real

struct Job {
    x: u32,     // first word
    a: u32,     // first element
    z: u32,     // first element
    tokens: u32,
    rank: u32,
    width: u32,
    dtype: u32,
}

@group(0) @binding(3) var<storage, read> x_words: array<u32>;
@group(0) @binding(4) var<storage, read> a: array<f32>;
@group(0) @binding(5) var<storage, read_write> z: array<Real>;

const TILE: u32 = 16u;

var<workgroup> x_tile: array<f32, TILE * TILE>;
var<workgroup> a_tile: array<f32, TILE * TILE>;

fn load_x(job: Job, row: u32, k: u32) -> f32 {
    if (row >= job.tokens || k >= job.width) {
        return 0.0;
    }
    let e = row * job.width + k;
    if (job.dtype == F32) {
        return bitcast<f32>(x_words[job.x + e]);
    }
    let pair = unpack_halves(x_words[job.x + e / 2u], job.dtype);
    return select(pair.x, pair.y, (e & 1u) == 1u);
}

fn load_a(job: Job, row: u32, k: u32) -> f32 {
    if (row >= job.rank || k >= job.width) {
        return 0.0;
    }
    return a[job.a + row * job.width + k];
}

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
    for (var k = 0u; k < job.width; k += TILE) {
        let x_value = load_x(job, row, k + j);
        let a_value = load_a(job, work.z * TILE + i, k + j);
        workgroupBarrier();
        x_tile[t] = x_value;
        a_tile[t] = a_value;
        workgroupBarrier();
        for (var d = 0u; d < TILE; d++) {
            sum = real_mul_add_f32(x_tile[i * TILE + d], a_tile[j * TILE + d], sum);
        }
    }
    if (row < job.tokens && column < job.rank) {
        z[job.z + row * job.rank + column] = sum;
    }
}
