// Adds the parts that a product was split into, in their order, and takes out the powers of two by which its operands'
// rows were scaled.
//
//   Z = Σ_p 2^(…) · part_p        parts: rows × stride each, one after the other; Z: tokens × rank, f32
//
// Scales of X are among the parts, tokens for each part; scales of A are what split_rows.wgsl left.
// Products that ran side by side left their parts in buffers of their own; a launch takes those of up to four, since
// launches that write to one Z wait for each other.
// Work: (job, first quad). Each workgroup handles CHUNK quads of columns, counted over rows of whole quads.
// Bindings: 3 to 6 parts, 7 Z, 8 scales of A.

#import shared/params
#import shared/exponents

struct Job {
    source: u32,    // which of the bindings of parts
    parts: u32, // first element, a multiple of 4
    z: u32,     // first element
    tokens: u32,
    rank: u32,
    stride: u32,    // a multiple of 4
    part_len: u32,  // elements of a part, a multiple of 4
    count: u32,     // of parts
    x_scales: u32,  // first element in parts, or NONE
    a_scales: u32,  // first element, or NONE
}

@group(0) @binding(3) var<storage, read> parts0: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> parts1: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read> parts2: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read> parts3: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read_write> z: array<f32>;
@group(0) @binding(8) var<storage, read> scales: array<f32>;

const NONE: u32 = 0xffffffffu;
const CHUNK: u32 = 256u;

fn quad(job: Job, at: u32) -> vec4<f32> {
    switch (job.source) {
        case 0u: { return parts0[at]; }
        case 1u: { return parts1[at]; }
        case 2u: { return parts2[at]; }
        default: { return parts3[at]; }
    }
}

fn x_inverse(job: Job, part: u32, row: u32) -> f32 {
    if (job.x_scales == NONE) {
        return 1.0;
    }
    let place = job.x_scales + part * job.tokens + row;
    return inverse_of(quad(job, place / 4u)[place % 4u]);
}

fn a_inverse(job: Job, row: u32) -> f32 {
    if (job.a_scales == NONE) {
        return 1.0;
    }
    return inverse_of(scales[job.a_scales + min(row, job.rank - 1u)]);
}

@compute @workgroup_size(CHUNK)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    if (!has_work(workgroup)) {
        return;
    }
    let work = work_table[work_index(workgroup)];
    let job = jobs[work.x];
    let quads = (job.rank + 3u) / 4u;
    let e = work.y + t;
    if (e >= job.tokens * quads) {
        return;
    }
    let row = e / quads;
    let column = (e - row * quads) * 4u;
    let a = vec4<f32>(
        a_inverse(job, column),
        a_inverse(job, column + 1u),
        a_inverse(job, column + 2u),
        a_inverse(job, column + 3u),
    );
    let first = (job.parts + row * job.stride + column) / 4u;
    var sum = vec4<f32>(0.0);
    for (var part = 0u; part < job.count; part++) {
        // The smaller factor comes first: the product of both alone may overflow.
        let x = vec4<f32>(x_inverse(job, part, row));
        sum += quad(job, first + part * job.part_len / 4u) * min(a, x) * max(a, x);
    }
    let at = job.z + row * job.rank + column;
    z[at] = sum.x;
    if (column + 1u < job.rank) { z[at + 1u] = sum.y; }
    if (column + 2u < job.rank) { z[at + 2u] = sum.z; }
    if (column + 3u < job.rank) { z[at + 3u] = sum.w; }
}
