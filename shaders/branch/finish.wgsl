// Scores from their parts: scores[token, k], for what decides by means of them.
//
// Grid: a workgroup for TOKENS tokens. Bindings: 3 stats, 4 scores.

#import branch/shared/job
#import shared/exp_log
#import branch/shared/state

@group(0) @binding(3) var<storage, read> stats: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> scores: array<f32>;

#import branch/shared/finish

const TOKENS: u32 = 32u;

@compute @workgroup_size(TOKENS * MAX_BRANCHES)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let job = jobs[0];
    let token = id.x / MAX_BRANCHES;
    let branch = id.x % MAX_BRANCHES;
    if (token < job.tokens && branch < job.branches) {
        scores[token * job.branches + branch] = finish(job, branch, token);
    }
}
