// Z = X·Aᵀ with sums in Real: the twin of project.wgsl for the f64 and double-single tiers.
//
//   X: tokens × width, row-major, f32, f16 or bf16      A: rank × width, f32      Z: tokens × rank, Real
//
// Work: (job, token tile, rank tile). A workgroup makes one 32 × 32 tile of Z, a thread four elements of it: in rows i and
// i + 16, columns j and j + 16. What the next step needs is read while this one computes.
// Bindings: 3 X as raw words, 4 A, 5 Z.

#import shared/params
#import shared/words
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

const TILE: u32 = 32u;
// One more than the tile, so that rows lie in different banks.
const STRIDE: u32 = 33u;

var<workgroup> x_tile: array<f32, TILE * STRIDE>;
var<workgroup> a_tile: array<f32, TILE * STRIDE>;

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

// What thread t brings of a tile: four rows of one column.
fn next_x(job: Job, row: u32, k: u32) -> vec4<f32> {
    return vec4(load_x(job, row, k), load_x(job, row + 8u, k), load_x(job, row + 16u, k), load_x(job, row + 24u, k));
}

fn next_a(job: Job, row: u32, k: u32) -> vec4<f32> {
    return vec4(load_a(job, row, k), load_a(job, row + 8u, k), load_a(job, row + 16u, k), load_a(job, row + 24u, k));
}

fn store(job: Job, row: u32, column: u32, sum: Real) {
    if (row < job.tokens && column < job.rank) {
        z[job.z + row * job.rank + column] = sum;
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
    let first = vec2(work.y, work.z) * TILE;
    // The place in the tiles of what this thread brings.
    let row = t / TILE;
    let depth = t % TILE;
    let place = row * STRIDE + depth;
    var x_next = next_x(job, first.x + row, depth);
    var a_next = next_a(job, first.y + row, depth);
    var sum00 = REAL_ZERO;
    var sum01 = REAL_ZERO;
    var sum10 = REAL_ZERO;
    var sum11 = REAL_ZERO;
    for (var k = 0u; k < job.width; k += TILE) {
        workgroupBarrier();
        x_tile[place] = x_next.x;
        x_tile[place + 8u * STRIDE] = x_next.y;
        x_tile[place + 16u * STRIDE] = x_next.z;
        x_tile[place + 24u * STRIDE] = x_next.w;
        a_tile[place] = a_next.x;
        a_tile[place + 8u * STRIDE] = a_next.y;
        a_tile[place + 16u * STRIDE] = a_next.z;
        a_tile[place + 24u * STRIDE] = a_next.w;
        workgroupBarrier();
        x_next = next_x(job, first.x + row, k + TILE + depth);
        a_next = next_a(job, first.y + row, k + TILE + depth);
        for (var d = 0u; d < TILE; d++) {
            let x0 = x_tile[i * STRIDE + d];
            let x1 = x_tile[(i + 16u) * STRIDE + d];
            let a0 = a_tile[j * STRIDE + d];
            let a1 = a_tile[(j + 16u) * STRIDE + d];
            sum00 = real_mul_add_f32(x0, a0, sum00);
            sum01 = real_mul_add_f32(x0, a1, sum01);
            sum10 = real_mul_add_f32(x1, a0, sum10);
            sum11 = real_mul_add_f32(x1, a1, sum11);
        }
    }
    store(job, first.x + i, first.y + j, sum00);
    store(job, first.x + i, first.y + j + 16u, sum01);
    store(job, first.x + i + 16u, first.y + j, sum10);
    store(job, first.x + i + 16u, first.y + j + 16u, sum11);
}
