// block_units.wgsl and block_held.wgsl without matrix units, to test on any adapter what is around them.

#import branch/shared/meet_software
#import branch/shared/block_any

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
