// A step down the sum of gradients, in place: x -= clamp(rate·g / rms(g), ±limit), or without `/ rms(g)`.
//
//   x: samples × len, f32      gradients: terms × samples × len      norms: of gradient_norm.wgsl
//
// A sample whose gradient is all zero, or at one place not finite, stays. rms: samples; 0 or -1 for those.
// A workgroup for each CHUNK elements of each sample, numbered through. Bindings: 3 gradients, 4 norms, 5 x, 6 rms.

#import shared/line
#import shared/gradient

@group(0) @binding(4) var<storage, read> norms: array<vec2<f32>>;
@group(0) @binding(5) var<storage, read_write> x: array<f32>;
@group(0) @binding(6) var<storage, read_write> rms: array<f32>;

const CHUNK: u32 = 1024u;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) t: u32,
) {
    let job = jobs[0];
    let number = workgroup_number(workgroup, workgroups);
    let chunks = (job.len + CHUNK - 1u) / CHUNK;
    let sample = number / chunks;
    if (sample >= job.samples) {
        return;
    }
    let chunk = number % chunks;
    var most = 0.0;
    for (var part = 0u; part < job.parts; part++) {
        most = max(most, norms[sample * job.parts + part].x);
    }
    var sum = 0.0;
    for (var part = 0u; part < job.parts; part++) {
        let norm = norms[sample * job.parts + part];
        let ratio = norm.x / select(1.0, most, most > 0.0);
        sum += norm.y * ratio * ratio;
    }
    let mean = sqrt(sum / f32(job.len));
    let stays = most == 0.0 || most >= BAD;
    if (chunk == 0u && t == 0u) {
        rms[sample] = select(most * mean, -1.0, most >= BAD);
    }
    if (stays) {
        return;
    }
    let first = sample * job.len;
    let end = min((chunk + 1u) * CHUNK, job.len);
    for (var i = chunk * CHUNK + t; i < end; i += 256u) {
        let g = gradient(job, first + i);
        var step = job.rate * g;
        if (job.normalise != 0u) {
            step = job.rate * (g / most / mean);
        }
        x[first + i] -= clamp(step, -job.limit, job.limit);
    }
}
