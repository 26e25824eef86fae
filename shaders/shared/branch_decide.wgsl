// From partial scores to the weight of each branch on each token.
//
//   FINISH: scores[token, k] from the parts of stats
//   DECIDE: weights[token, k]: 1 for the largest score (the first of equals), or with SOFT its share of the sum
//
// With NORMALISE a score counts in relation to the branch's running mean. Groups decide by their mean scores.
// FIXED: weights as the host says. Where it decides, it adds to the log's record how many tokens each branch won.
// After branch.wgsl, exp_log.wgsl and branch_state.wgsl. The kernel sets TOKENS, those of a workgroup, and declares
// stats, scores, weights, running and log_words.

// Of the workgroup's tokens: the scores by which they decide, then weights.
var<workgroup> shares: array<f32, TOKENS * MAX_BRANCHES>;
var<workgroup> wins: array<atomic<u32>, MAX_BRANCHES>;

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

// A thread does a branch of the workgroup's token `slot`; beyond the last branch or token, nothing. Every thread calls it.
fn choose(job: Job, slot: u32, branch: u32, token: u32) {
    let inside = token < job.tokens && branch < job.branches;
    let decides = inside && (job.flags & DECIDE) != 0u;
    let place = token * job.branches + branch;
    let first = slot * MAX_BRANCHES;
    if (slot == 0u && branch < MAX_BRANCHES) {
        atomicStore(&wins[branch], 0u);
    }
    if (inside && (job.flags & FINISH) != 0u) {
        scores[place] = finish(job, branch, token);
    }
    if (decides) {
        shares[first + branch] = decisive(job, branch, token);
    }
    workgroupBarrier();
    var best = 0u;
    var weight = 0.0;
    if (decides) {
        var most = shares[first];
        var sum = most;
        for (var k = 1u; k < job.branches; k++) {
            let value = shares[first + k];
            sum += value;
            if (value > most) {
                most = value;
                best = k;
            }
        }
        weight = select(0.0, 1.0, branch == best);
        if ((job.flags & FIXED) != 0u) {
            weight = job.fixed[branch];
        } else if ((job.flags & SOFT) != 0u) {
            weight = select(1.0 / f32(job.branches), shares[first + branch] / sum, sum > 0.0);
        }
    }
    workgroupBarrier();
    if (decides) {
        shares[first + branch] = weight;
        weights[place] = weight;
        if (branch == 0u) {
            atomicAdd(&wins[best], 1u);
        }
    }
    workgroupBarrier();
    if (slot == 0u && branch < job.branches && (job.flags & DECIDE) != 0u) {
        atomicAdd(&log_words[job.record + branch], atomicLoad(&wins[branch]));
    }
}
