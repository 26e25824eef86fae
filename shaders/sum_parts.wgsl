// Adds the parts that a product was split into, in their order, and takes out the powers of two by which its operands'
// rows were scaled.
//
//   Z = 2^(…) · Σ_p part_p        parts: rows × stride each, one after the other; Z: tokens × rank, f32
//
// Work: (job, first quad). Each workgroup handles 256 times 4 columns, counted over rows of whole quads.
// Bindings: 3 parts, 4 Z, 5 scales (see row_scale.wgsl).

#import params

struct Job {
    parts: u32, // first element, a multiple of 4
    z: u32,     // first element
    tokens: u32,
    rank: u32,
    stride: u32,    // a multiple of 4
    part_len: u32,  // elements of a part, a multiple of 4
    count: u32,     // of parts
    x_scales: u32,  // first element, or NONE
    a_scales: u32,
}

@group(0) @binding(3) var<storage, read> parts: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> z: array<f32>;
@group(0) @binding(5) var<storage, read> scales: array<f32>;

const NONE: u32 = 0xffffffffu;

// 1 / |s| of a power of two, exactly; 1 where there is none.
fn inverse(first: u32, row: u32) -> f32 {
    if (first == NONE) {
        return 1.0;
    }
    return bitcast<f32>((254u << 23u) - (bitcast<u32>(scales[first + row]) & 0x7fffffffu));
}

@compute @workgroup_size(256)
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
    var place = (job.parts + row * job.stride + column) / 4u;
    var sum = parts[place];
    for (var part = 1u; part < job.count; part++) {
        place += job.part_len / 4u;
        sum += parts[place];
    }
    let x = inverse(job.x_scales, row);
    let at = job.z + row * job.rank + column;
    z[at] = sum.x * (x * inverse(job.a_scales, column));
    if (column + 1u < job.rank) { z[at + 1u] = sum.y * (x * inverse(job.a_scales, column + 1u)); }
    if (column + 2u < job.rank) { z[at + 2u] = sum.z * (x * inverse(job.a_scales, column + 2u)); }
    if (column + 3u < job.rank) { z[at + 3u] = sum.w * (x * inverse(job.a_scales, column + 3u)); }
}
