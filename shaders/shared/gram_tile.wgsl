// What the kernels share that make a TILE × TILE tile of a partial Gram matrix on matrix units.
//
//   Z: tokens × rank, row-major, f32, rank a multiple of 4
//   G: one rank × rank matrix for each part of the tokens, stored one after the other
//
// Work: (job, tile row, tile column, part). A workgroup makes one tile of one partial G; only elements with row >= column
// are written. gram_reduce.wgsl adds the parts.
// Bindings: 3 Z, 4 partial G, 5 scales of the tokens.

#import shared/exponents

struct Job {
    z: u32,     // first element, a multiple of 4
    gram: u32,  // first element
    tokens: u32,
    rank: u32,
    part_tokens: u32,   // tokens of a part
    scales: u32,    // first element
}

@group(0) @binding(3) var<storage, read> z: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> gram: array<f32>;
@group(0) @binding(5) var<storage, read> scales: array<f32>;

const TILE: u32 = 128u;
const DEPTH: u32 = 32u;
const THREADS: u32 = 256u;
const QUADS: u32 = TILE / 4u;
// Tokens that all threads fetch at once.
const STEP: u32 = THREADS / QUADS;

// One 16 × 16 matrix of each subgroup on its way out.
var<workgroup> patches: array<f32, THREADS * 8u>;
// The first word holds the bits of the least scale; there are four, 16 bytes, so that the tile stays on them.
var<workgroup> least: array<atomic<u32>, 4>;

// The least scale of a part's tokens.
fn scale_of_part(job: Job, start: u32, end: u32, t: u32) -> f32 {
    if (t == 0u) {
        atomicStore(&least[0], 0x7f000000u);
    }
    workgroupBarrier();
    for (var token = start + t; token < end; token += THREADS) {
        atomicMin(&least[0], bitcast<u32>(scales[job.scales + token]) & 0x7fffffffu);
    }
    workgroupBarrier();
    return bitcast<f32>(atomicLoad(&least[0]));
}

fn fetch(job: Job, token: u32, end: u32, column: u32) -> vec4<f32> {
    if (token < end && column < job.rank) {
        return z[(job.z + token * job.rank + column) / 4u];
    }
    return vec4<f32>(0.0);
}

// Writes the patch of each subgroup to G.
fn store_patch(job: Job, part: u32, row: u32, column: u32, subgroup: u32, lane: u32, inverse: f32) {
    workgroupBarrier();
    for (var q = 0u; q < 8u; q++) {
        let e = q * 32u + lane;
        let r = row + e / 16u;
        let c = column + e % 16u;
        if (r < job.rank && c <= r) {
            gram[job.gram + (part * job.rank + r) * job.rank + c] = patches[subgroup * 256u + e] * inverse * inverse;
        }
    }
    workgroupBarrier();
}
