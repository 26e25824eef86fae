// Partial norms of the sum of gradients: (largest, Σ (g / largest)²) of each part of each sample.
//
//   gradients: terms × samples × len, f32      norms: samples × parts, vec2
//
// A workgroup for each part of each sample, numbered through. Bindings: 3 gradients, 4 norms.

#import shared/line
#import shared/gradient

@group(0) @binding(4) var<storage, read_write> norms: array<vec2<f32>>;

alias Value = f32;
#import shared/tree

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) t: u32,
) {
    let job = jobs[0];
    let number = workgroup_number(workgroup, workgroups);
    let sample = number / job.parts;
    if (sample >= job.samples) {
        return;
    }
    let part = number % job.parts;
    let first = sample * job.len + part * job.part_len;
    let end = min(first + job.part_len, (sample + 1u) * job.len);
    var most = 0.0;
    var bad = false;
    for (var e = first + t; e < end; e += 256u) {
        let g = gradient(job, e);
        // NaN is lost in a maximum.
        bad = bad || (bitcast<u32>(g) & 0x7f800000u) == 0x7f800000u;
        most = max(most, abs(g));
    }
    most = largest_of_all(select(most, BAD, bad), t);
    let scale = select(1.0, most, most > 0.0);
    var sum = 0.0;
    for (var e = first + t; e < end; e += 256u) {
        let g = gradient(job, e) / scale;
        sum += g * g;
    }
    sum = sum_of_all(sum, t);
    if (t == 0u) {
        norms[number] = vec2<f32>(most, sum);
    }
}
