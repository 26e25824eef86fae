// A power of two for each row that brings its largest value to [2^13, 2^14), in the range of f16.
//
//   rows × cols, row-major, f32, f16 or bf16, rows of whole 16 bytes      scales: rows, f32
//
// A scale is negative if values of its row have more than the 11 bits of f16. Values that are not finite count as zero, and
// rows that are all zero get the largest scale. For adapters with subgroups of 32, each of which does one row.
// Work: (job, first of 8 rows). Bindings: 3 matrix as raw words, 4 scales.

#import params
#import words

struct Job {
    matrix: u32,    // first word, a multiple of 4
    scales: u32,    // first element
    rows: u32,
    cols: u32,
    dtype: u32,
}

@group(0) @binding(3) var<storage, read> words: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read_write> scales: array<f32>;

const EXPONENT: u32 = 0x7f800000u;

// The exponents of f32 values in place; 0 for those that are not finite.
fn exponents(bits: vec4<u32>) -> vec4<u32> {
    let e = bits & vec4<u32>(EXPONENT);
    return select(e, vec4<u32>(0u), e == vec4<u32>(EXPONENT));
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
    var most = vec4<u32>(0u);
    var low = vec4<u32>(0u);
    for (var e = first + lane; e < first + vectors; e += 32u) {
        let v = words[e];
        if (job.dtype == F32) {
            most = max(most, exponents(v));
            low |= v;
        } else if (job.dtype == BF16) {
            most = max(most, max(exponents(v), exponents(v << vec4<u32>(16u))));
        } else {
            let x = bitcast<vec2<u32>>(unpack2x16float(v.x));
            let y = bitcast<vec2<u32>>(unpack2x16float(v.y));
            let z = bitcast<vec2<u32>>(unpack2x16float(v.z));
            let w = bitcast<vec2<u32>>(unpack2x16float(v.w));
            most = max(most, max(exponents(vec4<u32>(x, y)), exponents(vec4<u32>(z, w))));
        }
    }
    let largest = subgroupMax(max(max(most.x, most.y), max(most.z, most.w))) >> 23u;
    let low_bits = subgroupOr((low.x | low.y | low.z | low.w) & 0x1fffu);
    if (lane == 0u) {
        // A value in [2^e, 2^(e+1)) has exponent bits 127 + e, and 2^(13 - e) has 140 - e.
        let scale = bitcast<f32>(u32(clamp(267 - i32(largest), 1, 253)) << 23u);
        scales[job.scales + row] = select(scale, -scale, low_bits != 0u);
    }
}
