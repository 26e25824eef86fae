// What 256 threads have together, in an order that is always the same. The kernel says what a `Value` is: f32, or a vector
// of it. All threads must call these.

var<workgroup> pool: array<Value, 256>;

fn sum_of_all(value: Value, t: u32) -> Value {
    pool[t] = value;
    for (var half = 128u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (t < half) {
            pool[t] += pool[t + half];
        }
    }
    workgroupBarrier();
    let all = pool[0];
    // All threads read it before one writes it again.
    workgroupBarrier();
    return all;
}

fn largest_of_all(value: Value, t: u32) -> Value {
    pool[t] = value;
    for (var half = 128u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (t < half) {
            pool[t] = max(pool[t], pool[t + half]);
        }
    }
    workgroupBarrier();
    let all = pool[0];
    workgroupBarrier();
    return all;
}
