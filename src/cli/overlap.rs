//! What `loraweld inspect --overlap` adds: how far adapters are in each other's way.

use loraweld::merge::{Overlap, Overlaps, overlaps};
use loraweld::{Adapter, Device};

use super::output::{Output, Table};

/// Layers that the table shows.
const WORST: usize = 5;

/// An overlap so many times what chance gives is worth a word.
const NOTABLE: f64 = 2.0;

/// Shows a matrix of files × files, the layers where it is most, and who disturbs whom.
pub fn show(adapters: &[Adapter], out: &Output) -> anyhow::Result<()> {
    let weighted: Vec<_> = adapters.iter().map(|adapter| adapter.at(1.0)).collect();
    let found = out.long(|control| overlaps(&Device::cpu(), &weighted, control))?;
    out.event("overlap", &found)?;
    let Overlaps { all, layers } = &found;
    if layers.is_empty() {
        return out.result("No layer is in more than one of the files: they are not in each other's way.");
    }
    let names: Vec<&str> = adapters.iter().map(Adapter::name).collect();
    let heads: Vec<String> = names.iter().map(|name| format!(">{name}")).collect();
    let table = |what: &str, cell: &dyn Fn(&Overlap) -> String| {
        let heads: Vec<&str> = std::iter::once(what).chain(heads.iter().map(String::as_str)).collect();
        let mut table = Table::new(&heads);
        for (i, row) in all.iter().enumerate() {
            let cells = row.iter().enumerate().map(|(j, pair)| match pair {
                Some(pair) if i != j => cell(pair),
                _ => "-".into(),
            });
            table.row(std::iter::once(names[i].to_owned()).chain(cells));
        }
        table
    };
    let percent = |v: f64| format!("{:.1}%", 100.0 * v);
    out.result(table("share of the update that also reads what … reads", &|pair| {
        format!("{} ({} by chance)", percent(pair.disturbs), percent(pair.by_chance))
    }))?;
    out.result("")?;
    out.result(table("mean squared cosine, inputs / outputs; least angle", &|pair| {
        format!("{:.3} / {:.3}; {:.0}°", pair.inputs, pair.outputs, pair.angle)
    }))?;

    let mut worst: Vec<(f64, usize, usize, &str, Overlap)> = Vec::new();
    for layer in layers {
        for (x, row) in layer.pairs.iter().enumerate() {
            for (y, pair) in row.iter().enumerate().filter(|(y, _)| *y != x) {
                worst.push((pair.disturbs, layer.adapters[x], layer.adapters[y], &layer.layer, *pair));
            }
        }
    }
    worst.sort_by(|x, y| y.0.total_cmp(&x.0));
    out.result("")?;
    let mut table = Table::new(&["where it is most", "update of", "on inputs of", ">share", ">least angle"]);
    for (share, x, y, layer, pair) in worst.iter().take(WORST) {
        let angle = format!("{:.0}°", pair.angle);
        table.row([(*layer).to_owned(), names[*x].into(), names[*y].into(), percent(*share), angle]);
    }
    out.result(table)?;
    out.result("")?;
    out.result(sentence(&found, &names))
}

/// Who disturbs whom, in a sentence.
fn sentence(found: &Overlaps, names: &[&str]) -> String {
    let pairs = found.all.iter().enumerate().flat_map(|(i, row)| {
        row.iter()
            .enumerate()
            .filter(move |(j, _)| *j != i)
            .filter_map(move |(j, pair)| Some((i, j, (*pair)?)))
    });
    let most = pairs.max_by(|x, y| x.2.disturbs.total_cmp(&y.2.disturbs));
    let Some((i, j, pair)) = most else { return String::new() };
    let share = format!("{:.0} %", 100.0 * pair.disturbs);
    match pair.disturbs > NOTABLE * pair.by_chance {
        true => format!(
            "{} disturbs {} most: {share} of its update also reads what {} reads, where chance would give {:.0} %. A \
             plain sum does that twice on inputs of {}.",
            names[i],
            names[j],
            names[j],
            100.0 * pair.by_chance,
            names[j]
        ),
        false => format!(
            "None is much in another's way: at most {share} of an update ({}) also reads what another reads ({}), about \
             what chance gives.",
            names[i], names[j]
        ),
    }
}
