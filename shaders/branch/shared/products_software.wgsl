// products_units.wgsl without matrix units, to test on any adapter what is around them. Each lane has a token.

#import branch/shared/meet_software

var<private> own: array<f32, COLUMNS>;

fn clear_sums() {
    for (var i = 0u; i < COLUMNS; i++) {
        own[i] = 0.0;
    }
}

fn add_products(job: Job, channel: u32, row: u32) {
    for (var i = 0u; i < COLUMNS; i++) {
        var sum = 0.0;
        for (var k = 0u; k < DEPTH; k += 4u) {
            let at = fragment(job, channel + k, (row + i) / 16u * 16u) + i % 16u * 4u + k % 16u / 4u;
            let values = x_halves[(subgroup * TOKENS + lane) * STRIDE + k / 4u];
            sum += dot(vec4<f32>(values), vec4<f32>(a_halves[at]));
        }
        own[i] += sum;
    }
}

fn put_sums(block: u32) {
    for (var i = 0u; i < 4u; i++) {
        let first = block * 16u + i * 4u;
        let four = vec4<f32>(own[first], own[first + 1u], own[first + 2u], own[first + 3u]);
        sums[subgroup * OUT_LEN + lane * OUT_STRIDE + i] = four;
    }
}
