// Partial Gram matrices with sums in Real: the twin of gram.wgsl for the f64 and double-single tiers.
//
//   Z: tokens × rank, row-major, Real      G: one rank × rank matrix for each part of the tokens
//
// Work: (job, tile row, tile column, part). A workgroup makes one 16 × 16 tile of one partial G, a thread
// one element; only elements with row >= column are written. gram_reduce.wgsl adds the parts.
// Bindings: 3 Z as Part, 4 partial G. `part` says what they are.

#import shared/params
#import real
#import part

struct Job {
    z: u32,     // first element
    gram: u32,  // first element
    tokens: u32,
    rank: u32,
    part_tokens: u32,   // tokens of a part
}

@group(0) @binding(3) var<storage, read> z: array<Part>;
@group(0) @binding(4) var<storage, read_write> gram: array<Real>;

const TILE: u32 = 16u;

// [token][column]
var<workgroup> row_tile: array<Real, TILE * TILE>;
var<workgroup> column_tile: array<Real, TILE * TILE>;

fn load(job: Job, token: u32, end: u32, column: u32) -> Real {
    if (token >= end || column >= job.rank) {
        return REAL_ZERO;
    }
    return part_value(z[job.z + token * job.rank + column]);
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
    let start = work.w * job.part_tokens;
    let end = min(start + job.part_tokens, job.tokens);
    var sum = REAL_ZERO;
    for (var token = start; token < end; token += TILE) {
        let row_value = load(job, token + i, end, work.y * TILE + j);
        let column_value = load(job, token + i, end, work.z * TILE + j);
        workgroupBarrier();
        row_tile[t] = row_value;
        column_tile[t] = column_value;
        workgroupBarrier();
        for (var d = 0u; d < TILE; d++) {
            sum = real_mul_add(row_tile[d * TILE + i], column_tile[d * TILE + j], sum);
        }
    }
    if (row < job.rank && column <= row) {
        gram[job.gram + (work.w * job.rank + row) * job.rank + column] = sum;
    }
}
