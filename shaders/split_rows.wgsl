// Splits rows into halves for matrix units: each is brought into f16's range by a power of two and cut, by mask, into a
// high and a low part of 11 bits each.
//
//   A: rows × cols, f32, cols a multiple of 8      scales: padded rows, f32; negative where the row has a low part
//   high, low: A padded to whole matrices of 16 × 16, f16, zero outside. Each matrix lies by itself, row by row; those of
//   16 columns lie side by side, one for each 16 rows, before those of the next 16 columns. Matrices of other A may lie
//   beside them.
//
// For adapters with subgroups of 32, each of which does one row. Work: (job, first of ROWS rows, counted over padded rows).
// Bindings: 3 A, 4 high, 5 low, 6 scales.

enable f16;

#import shared/params
#import shared/halves

struct Job {
    a: u32,     // first element, a multiple of 4
    halves: u32,    // first element of high and of low, a multiple of 256
    scales: u32,    // first element
    rows: u32,
    cols: u32,
    width: u32,     // padded columns, a multiple of 16
    matrices: u32,  // side by side, those of other A too
}

@group(0) @binding(3) var<storage, read> a: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> high: array<vec4<f16>>;
@group(0) @binding(5) var<storage, read_write> low: array<vec4<f16>>;
@group(0) @binding(6) var<storage, read_write> scales: array<f32>;

const ROWS: u32 = 8u;

@compute @workgroup_size(ROWS * 32u)
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
    let row = work.y + subgroup;
    let vectors = select(0u, job.cols / 4u, row < job.rows);
    let first = job.a / 4u + row * (job.cols / 4u);
    var most = vec4<u32>(0u);
    var bits = vec4<u32>(0u);
    for (var e = lane; e < vectors; e += 32u) {
        let v = bitcast<vec4<u32>>(a[first + e]);
        most = max(most, exponents(v));
        bits |= v;
    }
    let scale = scale_of(subgroupMax(largest_of(most)));
    let low_bits = subgroupOr((bits.x | bits.y | bits.z | bits.w) & LOW_BITS);
    if (lane == 0u && row < (job.rows + 15u) / 16u * 16u) {
        scales[job.scales + row] = select(scale, -scale, low_bits != 0u);
    }
    // A row of a matrix is 4 vectors of the 64.
    let out = job.halves / 4u + row / 16u * 64u + row % 16u * 4u;
    for (var e = lane; e < job.width / 4u; e += 32u) {
        var value = vec4<f32>(0.0);
        if (e < vectors) {
            value = a[first + e] * scale;
        }
        let halves = split(value);
        let at = out + e / 4u * job.matrices * 64u + e % 4u;
        high[at] = halves.high;
        low[at] = halves.low;
    }
}
