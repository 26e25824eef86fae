// The cosine objective of features against a reference direction, and its gradient.
//
//   L = weight·(1 - f̂·r)        ∂L/∂f = -weight·(r - (f̂·r)·f̂) / |f|        f̂ = f / |f|
//
//   features, gradient: samples × width, f32      reference r: width, or samples × width      losses: samples
//
// Features that are all zero have no direction: L = weight, gradient 0.
// A workgroup for each sample, numbered through. Bindings: 3 features, 4 reference, 5 gradient, 6 losses.

#import shared/line

struct Job {
    samples: u32,
    width: u32,
    reference_stride: u32,  // 0: one for all
    weight: f32,
    losses: u32,            // first element
}

@group(0) @binding(1) var<storage, read> jobs: array<Job>;
@group(0) @binding(3) var<storage, read> features: array<f32>;
@group(0) @binding(4) var<storage, read> reference: array<f32>;
@group(0) @binding(5) var<storage, read_write> gradient: array<f32>;
@group(0) @binding(6) var<storage, read_write> losses: array<f32>;

alias Value = vec2<f32>;
#import shared/tree

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) t: u32,
) {
    let job = jobs[0];
    let sample = workgroup_number(workgroup, workgroups);
    if (sample >= job.samples) {
        return;
    }
    let first = sample * job.width;
    let direction = sample * job.reference_stride;
    var most = 0.0;
    for (var i = t; i < job.width; i += 256u) {
        most = max(most, abs(features[first + i]));
    }
    most = largest_of_all(vec2<f32>(most, 0.0), t).x;
    // Values are taken in relation to the largest, so that squares neither overflow nor vanish.
    let scale = select(1.0, most, most > 0.0);
    var sums = vec2<f32>(0.0);
    for (var i = t; i < job.width; i += 256u) {
        let f = features[first + i] / scale;
        sums += vec2<f32>(f * f, f * reference[direction + i]);
    }
    sums = sum_of_all(sums, t);
    let zero = most == 0.0;
    let norm = select(sqrt(sums.x), 1.0, zero);
    let cosine = select(sums.y / norm, 0.0, zero);
    for (var i = t; i < job.width; i += 256u) {
        let unit = features[first + i] / scale / norm;
        let g = -job.weight * (reference[direction + i] - cosine * unit) / norm / scale;
        gradient[first + i] = select(g, 0.0, zero);
    }
    if (t == 0u) {
        losses[job.losses + sample] = job.weight * (1.0 - cosine);
    }
}
