// A power of two for each row that brings its largest value to [2^13, 2^14), in the range of f16.
//
//   rows × cols, row-major, f32, f16 or bf16, rows of whole 16 bytes      scales: rows, f32
//
// Values that are not finite count as zero, and rows that are all zero get the largest scale. For adapters with
// subgroups of 32, each of which does one row. Work: (job, first of 8 rows). Bindings: 3 matrix as raw words, 4 scales.

#import params
#import words
#import exponents

struct Job {
    matrix: u32,    // first word, a multiple of 4
    scales: u32,    // first element
    rows: u32,
    cols: u32,
    dtype: u32,
}

@group(0) @binding(3) var<storage, read> words: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read_write> scales: array<f32>;

fn largest(v: vec4<u32>, dtype: u32) -> vec4<u32> {
    if (dtype == F32) {
        return exponents(v);
    }
    if (dtype == BF16) {
        return max(exponents(v), exponents(v << vec4<u32>(16u)));
    }
    let x = bitcast<vec2<u32>>(unpack2x16float(v.x));
    let y = bitcast<vec2<u32>>(unpack2x16float(v.y));
    let z = bitcast<vec2<u32>>(unpack2x16float(v.z));
    let w = bitcast<vec2<u32>>(unpack2x16float(v.w));
    return max(exponents(vec4<u32>(x, y)), exponents(vec4<u32>(z, w)));
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    if (!has_work(workgroup)) {
        return;
    }
    let work = work_table[work_index(workgroup)];
    let job = jobs[work.x];
    // Subgroups past the end repeat the last row's work.
    let row = min(work.y + subgroup, job.rows - 1u);
    let vectors = job.cols / select(8u, 4u, job.dtype == F32);
    let first = job.matrix / 4u + row * vectors;
    let last = vectors - 1u;
    var most = vec4<u32>(0u);
    // Four loads are under way at a time; past the end they repeat the last.
    for (var e = lane; e < vectors; e += 128u) {
        let v0 = words[first + e];
        let v1 = words[first + min(e + 32u, last)];
        let v2 = words[first + min(e + 64u, last)];
        let v3 = words[first + min(e + 96u, last)];
        most = max(most, max(largest(v0, job.dtype), largest(v1, job.dtype)));
        most = max(most, max(largest(v2, job.dtype), largest(v3, job.dtype)));
    }
    let scale = scale_of(subgroupMax(max(max(most.x, most.y), max(most.z, most.w))));
    if (lane == 0u) {
        scales[job.scales + row] = scale;
    }
}
