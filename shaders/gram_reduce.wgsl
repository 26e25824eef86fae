// Adds partial Gram matrices, in the order of their parts, to running sums of full precision, and
// mirrors the lower triangle.
//
//   S += Σ_p G_p        S, G_p: rank × rank
//
// Work: (job, first element). Each workgroup handles CHUNK elements, counted over the full square.
// Bindings: 3 partial G as Part, 4 sums as Real. `part` says what they are.

#import shared/params
#import real
#import part

struct Job {
    gram: u32,  // first element of part 0
    sums: u32,  // first element
    rank: u32,
    parts: u32,
}

@group(0) @binding(3) var<storage, read> gram: array<Part>;
@group(0) @binding(4) var<storage, read_write> sums: array<Real>;

const CHUNK: u32 = 256u;

@compute @workgroup_size(CHUNK)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    if (!has_work(workgroup)) {
        return;
    }
    let work = work_table[work_index(workgroup)];
    let job = jobs[work.x];
    let e = work.y + t;
    if (e >= job.rank * job.rank) {
        return;
    }
    let row = e / job.rank;
    let column = e - row * job.rank;
    if (column > row) {
        return;
    }
    var sum = sums[job.sums + e];
    for (var part = 0u; part < job.parts; part++) {
        sum = real_add(sum, part_value(gram[job.gram + part * job.rank * job.rank + e]));
    }
    sums[job.sums + e] = sum;
    sums[job.sums + column * job.rank + row] = sum;
}
