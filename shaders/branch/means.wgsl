// Mean scores over groups of tokens, and the running means of a layer.
//
//   scores[means + g·branches + k] = mean over group g of scores[token, k]
//   UPDATE_RUNNING: running[k] += (mean over all tokens - running[k])·tokens / n, n += tokens, at most WINDOW;
//            a mean that is not finite is left out
//
// A workgroup for each group, numbered through; with UPDATE_RUNNING one for all tokens. Sums are taken in a fixed order.
// Bindings: 3 scores, 4 running means.

#import shared/line
#import branch/shared/job

@group(0) @binding(3) var<storage, read_write> scores: array<f32>;
@group(0) @binding(4) var<storage, read_write> running: array<f32>;

// Tokens that a running mean reaches back.
const WINDOW: f32 = 1048576.0;

alias Value = f32;
#import shared/tree

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) t: u32,
) {
    let job = jobs[0];
    let group = workgroup_number(workgroup, workgroups);
    let all = (job.flags & UPDATE_RUNNING) != 0u;
    let size = select(job.group, job.tokens, all);
    let first = group * size;
    if (first >= job.tokens) {
        return;
    }
    let end = min(first + size, job.tokens);
    let tokens = f32(end - first);
    let place = job.running + MAX_BRANCHES;
    let n = min(running[place] + tokens, WINDOW);
    for (var k = 0u; k < job.branches; k++) {
        var sum = 0.0;
        for (var token = first + t; token < end; token += 256u) {
            sum += scores[token * job.branches + k];
        }
        sum = sum_of_all(sum, t);
        if (t == 0u) {
            let mean = sum / tokens;
            if (all) {
                let old = running[job.running + k];
                if ((bitcast<u32>(mean) & 0x7f800000u) != 0x7f800000u) {
                    running[job.running + k] = old + (mean - old) * min(tokens / n, 1.0);
                }
            } else {
                scores[job.means + group * job.branches + k] = mean;
            }
        }
    }
    if (all && t == 0u) {
        running[place] = n;
    }
}
