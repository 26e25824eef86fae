// block_units.wgsl and block_held.wgsl without matrix units, to test on any adapter what is around them. Subgroups are
// counted by thread, 32 each.

fn locate(thread: u32, subgroup_id: u32, subgroup_lane: u32) {
    t = thread;
    subgroup = thread / 32u;
    lane = thread % 32u;
}

fn meet() {
    workgroupBarrier();
}

fn hold() {}

fn multiply(job: Job, channel: u32, first: u32, end: u32, place: u32) {
    let quads = CHANNELS / 4u;
    for (var e = lane; e < TOKENS * quads; e += 32u) {
        let row = e / quads;
        var sum = vec4<f32>(0.0);
        for (var i = 0u; i < 4u; i++) {
            let own = channel + e % quads * 4u + i;
            for (var k = first; k < end; k += 4u) {
                let b_at = fragment(job, own, k / 16u * 16u) + own % 16u * 4u + k % 16u / 4u;
                let z = vec4<f32>(z_halves[row * STRIDE + (place + k - first) / 4u]);
                sum[i] += dot(z, vec4<f32>(b_halves[b_at]));
            }
        }
        sums[subgroup * OUT_LEN + row * OUT_STRIDE + e % quads] = sum;
    }
}

// The first of two branches, columns `first` .. `end` of B_cat.
fn multiply_first(job: Job, channel: u32, first: u32, end: u32) {
    multiply(job, channel, first, end, 0u);
}

// The second, whose Z is from column `place` on.
fn multiply_second(job: Job, channel: u32, first: u32, end: u32, place: u32) {
    multiply(job, channel, first, end, place);
}

// All columns.
fn multiply_all(job: Job, channel: u32) {
    multiply(job, channel, 0u, job.columns, 0u);
}
