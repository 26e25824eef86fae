// From partial scores to the weight of each branch on each token.
//
//   FINISH: scores[token, k] from the parts of stats
//   DECIDE: weights[token, k]: 1 for the largest score (the first of equals), or with SOFT its share of the sum
//
// With NORMALISE a score counts in relation to the branch's running mean. Groups decide by their mean scores.
// FIXED: weights as the host says. A workgroup of 256 does one token each; where it decides, it adds to the
// log's record how many tokens each branch won.
// Bindings: 3 stats, 4 scores, 5 weights, 6 running means, 7 log.

#import branch
#import exp_log
#import branch_state

@group(0) @binding(3) var<storage, read> stats: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> scores: array<f32>;
@group(0) @binding(5) var<storage, read_write> weights: array<f32>;
@group(0) @binding(6) var<storage, read> running: array<f32>;
@group(0) @binding(7) var<storage, read_write> log_words: array<atomic<u32>>;

var<workgroup> wins: array<atomic<u32>, 8>;

fn part_of(job: Job, part: u32, branch: u32, token: u32) -> State {
    let place = ((part * job.branches + branch) * job.tokens + token) * 2u;
    let v = stats[place];
    return State(v.x, v.y, v.z, v.w, stats[place + 1u].x);
}

// 1 - cos(f0, f0 + u) without cancellation, from a = f0², b = f0·u, q = u².
fn one_minus_cosine(a: f32, b: f32, q: f32) -> f32 {
    let f = max(a + 2.0 * b + q, 0.0);
    if (a == 0.0 || f == 0.0) {
        return select(1.0, 0.0, q == 0.0);
    }
    let norms = sqrt(a) * sqrt(f);
    let dot = a + b;
    if (dot < 0.0) {
        return 1.0 - dot / norms;
    }
    // (|f0||f|)² - (f0·f)² = a·q - b²
    let ratio = b / sqrt(a);
    return max(q - ratio * ratio, 0.0) * (a / norms) / (norms + dot);
}

fn finish(job: Job, branch: u32, token: u32) -> f32 {
    var x = part_of(job, 0u, branch, token);
    for (var part = 1u; part < job.parts; part++) {
        let y = part_of(job, part, branch, token);
        if (job.score == KL) {
            x = merge_states(x, y);
        } else {
            x = State(x.m + y.m, x.w + y.w, x.c + y.c, 0.0, 0.0);
        }
    }
    if (job.score == KL) {
        return divergence(x);
    }
    if (job.score == DOT) {
        return one_minus_cosine(x.m, x.w, x.c);
    }
    return x.c;
}

// The score by which a token decides.
fn decisive(job: Job, branch: u32, token: u32) -> f32 {
    if ((job.flags & FIXED) != 0u) {
        return job.fixed[branch];
    }
    var place = token * job.branches;
    if (job.group > 0u) {
        place = job.means + token / job.group * job.branches;
    }
    let score = scores[place + branch];
    if ((job.flags & NORMALISE) == 0u) {
        return score;
    }
    let mean = running[job.running + branch];
    return select(0.0, score / mean, mean > 0.0);
}

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let job = jobs[0];
    let token = id.x;
    let inside = token < job.tokens;
    if (t < MAX_BRANCHES) {
        atomicStore(&wins[t], 0u);
    }
    workgroupBarrier();
    if (inside && (job.flags & FINISH) != 0u) {
        for (var k = 0u; k < job.branches; k++) {
            scores[token * job.branches + k] = finish(job, k, token);
        }
    }
    if (inside && (job.flags & DECIDE) != 0u) {
        var best = 0u;
        var most = decisive(job, 0u, token);
        var sum = most;
        for (var k = 1u; k < job.branches; k++) {
            let value = decisive(job, k, token);
            sum += value;
            if (value > most) {
                most = value;
                best = k;
            }
        }
        for (var k = 0u; k < job.branches; k++) {
            var weight = select(0.0, 1.0, k == best);
            if ((job.flags & FIXED) != 0u) {
                weight = job.fixed[k];
            } else if ((job.flags & SOFT) != 0u) {
                let value = decisive(job, k, token);
                weight = select(1.0 / f32(job.branches), value / sum, sum > 0.0);
            }
            weights[token * job.branches + k] = weight;
        }
        atomicAdd(&wins[best], 1u);
    }
    workgroupBarrier();
    if (t < job.branches && (job.flags & DECIDE) != 0u) {
        atomicAdd(&log_words[job.record + t], atomicLoad(&wins[t]));
    }
}
