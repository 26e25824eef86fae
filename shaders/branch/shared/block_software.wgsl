// block_units.wgsl without matrix units, to test on any adapter what is around them. Subgroups are counted by thread, 32
// each.

fn locate(thread: u32, subgroup_id: u32, subgroup_lane: u32) {
    t = thread;
    subgroup = thread / 32u;
    lane = thread % 32u;
}

fn meet() {
    workgroupBarrier();
}

fn multiply(job: Job, block: u32, first: u32, end: u32, place: u32) {
    for (var e = lane; e < TOKENS * CHANNELS / 4u; e += 32u) {
        let row = e / 4u;
        var sum = vec4<f32>(0.0);
        for (var i = 0u; i < 4u; i++) {
            for (var k = first; k < end; k += 4u) {
                let b_at = fragment(job, block, k / 16u * 16u) + (e % 4u * 4u + i) * 4u + k % 16u / 4u;
                let z = vec4<f32>(z_halves[row * STRIDE + (place + k - first) / 4u]);
                sum[i] += dot(z, vec4<f32>(b_halves[b_at]));
            }
        }
        sums[subgroup * OUT_LEN + row * OUT_STRIDE + e % 4u] = sum;
    }
}
