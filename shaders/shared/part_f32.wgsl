// What is summed comes as f32.

alias Part = f32;

fn part_value(part: Part) -> Real {
    return real(part);
}
