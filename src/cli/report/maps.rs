//! Layers as maps of blocks × modules.

use std::collections::BTreeMap;

use super::html::{Cell, Column, Grid};
use crate::cli::layers::group;

/// A layer's block, module and number.
type Placed<'a> = (Vec<u64>, &'a str, f64);

/// One map for each kind of block, of what is known of its layers; `of` makes a cell of a number.
pub fn maps(values: &[(&str, f64)], of: impl Fn(f64) -> Cell) -> Vec<Grid> {
    let split = values.iter().map(|&(name, value)| {
        let (kind, block, module) = place(name);
        (kind, (block, module, value))
    });
    let map = |(kind, layers): (String, Vec<Placed<'_>>)| {
        let mut modules: Vec<&str> = Vec::new();
        let mut blocks: BTreeMap<&[u64], BTreeMap<&str, f64>> = BTreeMap::new();
        for (block, module, value) in &layers {
            if !modules.contains(module) {
                modules.push(module);
            }
            blocks.entry(block).or_default().insert(module, *value);
        }
        if kind.is_empty() {
            let rows = layers.iter().map(|(_, name, value)| vec![Cell::text(*name), of(*value)]).collect();
            let columns = vec![Column::new("layer"), Column::new(">value")];
            return Grid { caption: "outside blocks".into(), columns, rows, map: true, ..Grid::default() };
        }
        let columns = std::iter::once("block".to_owned()).chain(modules.iter().map(|m| format!(">{m}")));
        let row = |(block, cells): (&[u64], BTreeMap<&str, f64>)| {
            let name = block.iter().map(u64::to_string).collect::<Vec<_>>().join(".");
            let cell = |module| cells.get(module).map_or_else(Cell::default, |&value| of(value));
            std::iter::once(Cell::text(name)).chain(modules.iter().map(cell)).collect()
        };
        Grid {
            caption: kind,
            columns: columns.map(|name| Column::new(&name)).collect(),
            rows: blocks.into_iter().map(row).collect(),
            map: true,
            ..Grid::default()
        }
    };
    group(split).into_iter().map(map).collect()
}

/// The kind and the numbers of a layer's block; neither outside of blocks.
pub fn block_of(name: &str) -> (String, Vec<u64>) {
    let (kind, block, _) = place(name);
    (kind, block)
}

/// Kind of block, numbers of the block, and module: `blocks.*`, 3 and `attn.to_q` of `blocks.3.attn.to_q`. Numbers are a
/// block's as [`pattern`](crate::cli::layers::pattern) has it; a layer outside blocks is all module.
fn place(name: &str) -> (String, Vec<u64>, &str) {
    let (mut kind, mut end, mut numbers) = (String::new(), 0, Vec::new());
    let (mut text, mut place, mut counts) = (String::new(), 0, false);
    for part in name.split_inclusive(['.', '_']) {
        let word = part.trim_end_matches(['.', '_']);
        place += part.len();
        match word.parse::<u64>() {
            Ok(number) if counts => {
                numbers.push(number);
                text += "*";
                (kind, end) = (text.clone(), place);
                text += &part[word.len()..];
            }
            _ => {
                text += part;
                counts = word.ends_with('s');
            }
        }
    }
    match &name[end..] {
        // A block that is a layer itself.
        "" => (kind, numbers, "itself"),
        module => (kind, numbers, module),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_and_modules_are_told_apart() {
        for (name, kind, block, module) in [
            ("transformer_blocks.11.attn.to_out.0", "transformer_blocks.*", &[11][..], "attn.to_out.0"),
            ("input_blocks_4_1_proj_in", "input_blocks_*_*", &[4, 1], "proj_in"),
            ("norm1.linear", "", &[], "norm1.linear"),
            ("blocks.3", "blocks.*", &[3], "itself"),
        ] {
            assert_eq!(place(name), (kind.to_owned(), block.to_vec(), module));
        }
    }

    #[test]
    fn a_map_has_a_row_for_each_block() {
        let values = [("blocks.0.q", 0.5), ("blocks.10.k", 0.1), ("blocks.2.q", 0.2), ("out", 1.0)];
        let maps = maps(&values, Cell::loss);
        let rows = |grid: &Grid| {
            let row = |row: &Vec<Cell>| row.iter().map(|cell| cell.text.clone()).collect::<Vec<_>>();
            grid.rows.iter().map(row).collect::<Vec<_>>()
        };
        assert_eq!(rows(&maps[0]), [["0", "0.500", ""], ["2", "0.200", ""], ["10", "", "0.100"]]);
        assert_eq!(rows(&maps[1]), [["out", "1.000"]]);
    }
}
