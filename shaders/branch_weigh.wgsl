// Z *= weight of its branch on its token, and the branch's factor, in place; what branch_apply.wgsl multiplies.
//
//   Z: tokens × rank, f32      weights: tokens × branches
//
// Where the weight is zero Z becomes zero, also where the branch overflowed.
// Grid: a workgroup for 16 tokens. Bindings: 3 Z, 4 weights, 5 controls.

#import branch

@group(0) @binding(3) var<storage, read_write> z: array<f32>;
@group(0) @binding(4) var<storage, read> weights: array<f32>;
@group(0) @binding(5) var<storage, read> controls: Controls;

const TOKENS: u32 = 16u;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) work: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let job = jobs[0];
    let end = min((work.x + 1u) * TOKENS, job.tokens) * job.rank;
    for (var e = work.x * TOKENS * job.rank + t; e < end; e += 256u) {
        let token = e / job.rank;
        let k = e % job.rank;
        var branch = 0u;
        while (k >= job.starts[branch + 1u]) {
            branch++;
        }
        let weight = weights[token * job.branches + branch];
        let factor = job.factors[branch] * controls.strengths[job.adapters[branch]];
        z[e] = select(z[e] * (weight * factor), 0.0, weight == 0.0);
    }
}
