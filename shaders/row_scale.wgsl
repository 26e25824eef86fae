// A power of two for each row that brings its largest value to [2^13, 2^14), in the range of f16.
//
//   rows × cols, row-major, f32, f16 or bf16      scales: rows, f32
//
// Rows that are all zero, and values that are not finite, count as 1. Work: (job, row): a workgroup does
// one row. Bindings: 3 matrix as raw words, 4 scales.

#import params
#import words

struct Job {
    matrix: u32,    // first word
    scales: u32,    // first element
    cols: u32,
    dtype: u32,
}

@group(0) @binding(3) var<storage, read> words: array<u32>;
@group(0) @binding(4) var<storage, read_write> scales: array<f32>;

const THREADS: u32 = 128u;

var<workgroup> largest: array<u32, THREADS>;

// The exponent bits; 0 for what is not finite.
fn exponent(value: f32) -> u32 {
    let bits = (bitcast<u32>(value) >> 23u) & 0xffu;
    return select(bits, 0u, bits == 0xffu);
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    if (!has_work(workgroup)) {
        return;
    }
    let work = work_table[work_index(workgroup)];
    let job = jobs[work.x];
    let first = work.y * job.cols;
    var most = 0u;
    if (job.dtype == F32) {
        for (var e = first + t; e < first + job.cols; e += THREADS) {
            most = max(most, exponent(bitcast<f32>(words[job.matrix + e])));
        }
    } else {
        // Whole words; at the ends of an odd row they hold a neighbour's value, which counts too.
        let end = (first + job.cols + 1u) / 2u;
        for (var w = first / 2u + t; w < end; w += THREADS) {
            let pair = unpack_halves(words[job.matrix + w], job.dtype);
            most = max(most, max(exponent(pair.x), exponent(pair.y)));
        }
    }
    largest[t] = most;
    workgroupBarrier();
    for (var half = THREADS / 2u; half > 0u; half /= 2u) {
        if (t < half) {
            largest[t] = max(largest[t], largest[t + half]);
        }
        workgroupBarrier();
    }
    if (t == 0u) {
        // A value in [2^e, 2^(e+1)) has exponent bits 127 + e, and 2^(13 - e) has 140 - e.
        let bits = clamp(267 - i32(largest[0]), 1, 253);
        scales[job.scales + work.y] = select(bitcast<f32>(u32(bits) << 23u), 1.0, largest[0] == 0u);
    }
}
