// From partial scores to the weight of each branch on each token; see branch_decide.wgsl. On matrix units
// branch_weigh_matrix.wgsl decides.
//
// Grid: a workgroup for 32 tokens. Bindings: 3 stats, 4 scores, 5 weights, 6 running means, 7 log.

#import branch
#import exp_log
#import branch_state

@group(0) @binding(3) var<storage, read> stats: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> scores: array<f32>;
@group(0) @binding(5) var<storage, read_write> weights: array<f32>;
@group(0) @binding(6) var<storage, read> running: array<f32>;
@group(0) @binding(7) var<storage, read_write> log_words: array<atomic<u32>>;

const TOKENS: u32 = 32u;

#import branch_decide

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) work: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let slot = t / MAX_BRANCHES;
    choose(jobs[0], slot, t % MAX_BRANCHES, work.x * TOKENS + slot);
}
