// branch_choose.wgsl and branch_weigh.wgsl in one, for matrix units: decides, and leaves Z, each branch times its factor
// and its weight on the token, as halves; see branch_decide.wgsl and branch_split.wgsl.
//
//   Z: tokens × rank, f32      halves: z_rows × columns, f16      scales: z_rows
//
// Where the weight is zero Z becomes zero, also where the branch overflowed.
// Grid: a workgroup for 8 tokens. Bindings: 3 Z, 4 halves, 5 scales, 6 controls, 7 stats, 8 scores, 9 weights,
// 10 running means, 11 log.

#import branch
#import exponents
#import exp_log
#import branch_state

@group(0) @binding(3) var<storage, read> values: array<f32>;
@group(0) @binding(4) var<storage, read_write> halves: array<vec4<f16>>;
@group(0) @binding(5) var<storage, read_write> scales: array<f32>;
@group(0) @binding(6) var<storage, read> controls: Controls;
@group(0) @binding(7) var<storage, read> stats: array<vec4<f32>>;
@group(0) @binding(8) var<storage, read_write> scores: array<f32>;
@group(0) @binding(9) var<storage, read_write> weights: array<f32>;
@group(0) @binding(10) var<storage, read> running: array<f32>;
@group(0) @binding(11) var<storage, read_write> log_words: array<atomic<u32>>;

const TOKENS: u32 = 8u;

#import branch_decide
#import branch_split
#import branch_split_row

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) work: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let job = jobs[0];
    let slot = t / 32u;
    let token = work.x * TOKENS + slot;
    let column = t % 32u * 4u;
    let inside = column < job.columns;
    var value = vec4<f32>(0.0);
    if (inside && token < job.tokens) {
        value = z_quad(job, token, column);
    }
    choose(job, slot, t % 32u, token);
    if (inside && token < job.tokens) {
        let branch = branch_of(column);
        let weight = shares[slot * MAX_BRANCHES + branch];
        let factor = jobs[0].factors[branch] * controls.strengths[jobs[0].adapters[branch]];
        value = select(value * (weight * factor), vec4<f32>(0.0), weight == 0.0);
    }
    put_row(job, t, token, column, inside, value, token);
}
