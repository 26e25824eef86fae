// Reading F0. The kernel declares f0_words, the permutation sets DTYPE.

#import shared/words

// Channels channel .. + 4 of F0; `outside` beyond its width. A halves' width is even.
fn features(job: Job, token: u32, channel: u32, outside: f32) -> vec4<f32> {
    var f = vec4<f32>(outside);
    if (token >= job.first + job.count || channel >= job.width) {
        return f;
    }
    let e = (token - job.first) * job.width + channel;
    if (DTYPE == F32) {
        let w = job.f0 + e;
        f.x = bitcast<f32>(f0_words[w]);
        if (channel + 1u < job.width) { f.y = bitcast<f32>(f0_words[w + 1u]); }
        if (channel + 2u < job.width) { f.z = bitcast<f32>(f0_words[w + 2u]); }
        if (channel + 3u < job.width) { f.w = bitcast<f32>(f0_words[w + 3u]); }
        return f;
    }
    let w = job.f0 + e / 2u;
    let low = unpack_halves(f0_words[w], DTYPE);
    f.x = low.x;
    f.y = low.y;
    if (channel + 2u < job.width) {
        let high = unpack_halves(f0_words[w + 1u], DTYPE);
        f.z = high.x;
        f.w = high.y;
    }
    return f;
}
