// A power of two for each row that brings its largest value to [2^13, 2^14), in the range of f16.
//
//   rows × cols, row-major, f32, cols a multiple of 4      scales: rows, f32
//
// Values that are not finite count as zero, and rows that are all zero get the largest scale. For adapters with
// subgroups of 32, each of which does one row. Work: (job, first of ROWS rows). Bindings: 3 matrix, 4 scales.

#import shared/params
#import shared/exponents

struct Job {
    matrix: u32,    // first element, a multiple of 4
    scales: u32,    // first element
    rows: u32,
    cols: u32,
}

@group(0) @binding(3) var<storage, read> matrix: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read_write> scales: array<f32>;

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
    // Subgroups past the end repeat the last row's work.
    let row = min(work.y + subgroup, job.rows - 1u);
    let vectors = job.cols / 4u;
    let first = job.matrix / 4u + row * vectors;
    let last = vectors - 1u;
    var most = vec4<u32>(0u);
    // Four loads are under way at a time; past the end they repeat the last.
    for (var e = lane; e < vectors; e += 128u) {
        let v0 = matrix[first + e];
        let v1 = matrix[first + min(e + 32u, last)];
        let v2 = matrix[first + min(e + 64u, last)];
        let v3 = matrix[first + min(e + 96u, last)];
        most = max(most, max(exponents(v0), exponents(v1)));
        most = max(most, max(exponents(v2), exponents(v3)));
    }
    let scale = scale_of(subgroupMax(largest_of(most)));
    if (lane == 0u) {
        scales[job.scales + row] = scale;
    }
}
