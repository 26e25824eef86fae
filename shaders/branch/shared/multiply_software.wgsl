// multiply_units.wgsl without matrix units, to test on any adapter what is around them: what the kernels exchange stays among
// 8 neighbours.

#import branch/shared/place_software

fn multiply(count: u32) {
    for (var e = lane; e < 256u; e += 32u) {
        let z_at = (subgroup * 16u + e / 16u) * STRIDE;
        var sum = vec4<f32>(0.0);
        for (var i = 0u; i < 4u; i++) {
            let b_at = (e % 16u * 4u + i) * STRIDE;
            for (var k = 0u; k < count / 4u; k++) {
                let zh = vec4<f32>(halves[z_at + k]);
                let z = zh + vec4<f32>(halves[Z_LOW + z_at + k]);
                sum[i] += dot(z, vec4<f32>(halves[B_HIGH + b_at + k]));
                if (LOW) {
                    sum[i] += dot(zh, vec4<f32>(halves[B_LOW + b_at + k]));
                }
            }
        }
        sums[(subgroup * 16u + e / 16u) * OUT_STRIDE + e % 16u] = sum;
    }
}
