// Rows of Z as halves for matrix units, brought into f16's range; each by 32 threads with a quad of columns.
// After exponents.wgsl and branch_split.wgsl. The kernel declares halves: z_rows × columns, f16; and scales: what undoes
// the powers of two, Z's and B_cat's.

var<workgroup> most: array<u32, 256>;

// Four columns of Z.
fn z_quad(job: Job, token: u32, column: u32) -> vec4<f32> {
    let branch = branch_of(column);
    let first = jobs[0].starts[branch];
    let rank = jobs[0].starts[branch + 1u] - first;
    return quad(token * job.rank + first, 1u, column - jobs[0].column_starts[branch], rank);
}

// Every thread calls it, those of columns that are not `inside` with zeros; `at`: the row's scale.
fn put_row(job: Job, t: u32, token: u32, column: u32, inside: bool, value: vec4<f32>, at: u32) {
    let exponent = exponents(bitcast<vec4<u32>>(value));
    most[t] = max(max(exponent.x, exponent.y), max(exponent.z, exponent.w));
    workgroupBarrier();
    var all = 0u;
    for (var i = 0u; i < 32u; i++) {
        all = max(all, most[t / 32u * 32u + i]);
    }
    let scale = scale_of(all);
    if (t % 32u == 0u) {
        // 1 / s of a power of two, exactly.
        scales[at] = bitcast<f32>((254u << 23u) - bitcast<u32>(scale)) / B_SCALE;
    }
    if (inside) {
        let place = (token * job.columns + column) / 4u;
        let scaled = value * scale;
        let high = high_part(scaled);
        halves[place] = vec4<f16>(high);
        halves[job.z_rows * job.columns / 4u + place] = vec4<f16>(scaled - high);
    }
}
