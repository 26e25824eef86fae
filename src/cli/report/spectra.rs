//! Singular values of layers as curves, with what is kept of them: one small drawing a module.

use std::fmt::Write;

use loraweld::merge::SingularValues;

use super::html::{Plot, percent};
use super::maps::block_of;
use crate::cli::layers::{group, pattern, range};
use crate::cli::output::count;

/// More drawings than this are no overview.
const MOST: usize = 24;

/// What is smaller beside the largest value is drawn at the bottom.
const DECADES: f64 = 3.0;

/// Of the drawing, in its own units; the rest is for what stands at the axes.
const WIDTH: f64 = 200.0;
const HEIGHT: f64 = 90.0;

/// A drawing for each module, or for each kind of block if modules are many, or one. `does`: what becomes of values that
/// count, such as "keeps".
pub fn spectra(all: &[(&str, &SingularValues)], does: &str) -> Vec<Plot> {
    let by_kind = |name: &str| match block_of(name).0 {
        kind if kind.is_empty() => "outside blocks".to_owned(),
        kind => kind,
    };
    let by: [&dyn Fn(&str) -> String; 3] = [&pattern, &by_kind, &|_| "all layers".to_owned()];
    let groups = by.iter().map(|by| group(all.iter().map(|(name, values)| (by(name), *values))));
    let groups = groups.into_iter().find(|groups| groups.len() <= MOST);
    groups.into_iter().flatten().map(|(name, layers)| plot(name, &layers, does)).collect()
}

fn plot(caption: String, layers: &[&SingularValues], does: &str) -> Plot {
    let longest = layers.iter().map(|layer| layer.values.len()).max().unwrap_or(0);
    let x = |place: f64| WIDTH * place / longest.max(1) as f64;
    let y = |share: f64| HEIGHT * (-share.log10() / DECADES).clamp(0.0, 1.0);
    // Where the curves are at each place: the least, the median and the most of the layers that reach it.
    let at = |place: usize| {
        let share = |layer: &&&SingularValues| {
            Some(layer.values.get(place)? / layer.values[0].max(f64::MIN_POSITIVE))
        };
        let mut shares: Vec<f64> = layers.iter().filter_map(|layer| share(&layer)).collect();
        shares.sort_by(f64::total_cmp);
        [shares[0], shares[shares.len() / 2], shares[shares.len() - 1]].map(y)
    };
    let curves: Vec<[f64; 3]> = (0..longest).map(at).collect();
    let line = |path: &mut String, which: usize, places: &mut dyn Iterator<Item = usize>| {
        for place in places {
            let step = if path.is_empty() { 'M' } else { 'L' };
            // A String takes everything.
            let _ = write!(path, "{step}{:.1} {:.1}", x(place as f64 + 0.5), curves[place][which]);
        }
    };
    let (mut band, mut median) = (String::new(), String::new());
    line(&mut band, 2, &mut (0..longest));
    line(&mut band, 0, &mut (0..longest).rev());
    line(&mut median, 1, &mut (0..longest));

    let kept = layers.iter().map(|layer| layer.kept);
    let (least, most) = (kept.clone().min().unwrap_or(0), kept.clone().max().unwrap_or(0));
    let energies = layers.iter().map(|layer| layer.energy());
    let (low, high) =
        energies.fold((f64::INFINITY, 0.0), |(low, high), e| (f64::min(low, e), f64::max(high, e)));
    let energy = match (percent(low), percent(high)) {
        (low, high) if low == high => low,
        (low, high) => format!("{low} to {high}"),
    };
    let of = range(layers.iter().map(|layer| layer.values.len()));
    let note =
        format!("{}: {does} {} of {of}, {energy} of the energy", count(layers.len(), "layer"), range(kept));

    let mut svg = String::from(r#"<svg class="curve" viewBox="-30 -6 236 112" aria-hidden="true">"#);
    for (decade, name) in ["1", "0.1", "0.01", "0.001"].iter().enumerate() {
        let y = HEIGHT * decade as f64 / DECADES;
        let _ = write!(
            svg,
            r#"<path class="base" d="M0 {y:.1}H{WIDTH}"/><text x="-4" y="{:.1}" class="y">{name}</text>"#,
            y + 4.0
        );
    }
    let _ = write!(
        svg,
        r#"<path class="band" d="{band}Z"/><path class="median" d="{median}"/><rect class="between" x="{:.1}" width="{:.1}" height="{HEIGHT}"/>"#,
        x(least as f64),
        x((most - least) as f64)
    );
    for cut in [least, most] {
        let _ = write!(svg, r#"<path class="cut" d="M{:.1} -4V{HEIGHT}"/>"#, x(cut as f64));
    }
    let _ = write!(
        svg,
        r#"<text x="{:.1}" y="103">1</text><text x="{WIDTH}" y="103" class="y">{longest}</text></svg>"#,
        x(0.5)
    );
    Plot { caption, note, svg }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_is_a_drawing_and_tells_what_is_kept() {
        let values = |values: &[f64], kept| SingularValues { values: values.to_vec(), kept };
        let (one, other) = (values(&[2.0, 1.0, 1.0], 1), values(&[4.0, 0.0], 2));
        let nothing = values(&[], 0);
        let plots = spectra(&[("blocks.0.q", &one), ("blocks.1.q", &other), ("out", &nothing)], "keeps");
        let notes: Vec<_> = plots.iter().map(|plot| (plot.caption.as_str(), plot.note.as_str())).collect();
        assert_eq!(
            notes,
            [
                ("blocks.*.q", "2 layers: keeps 1 to 2 of 2 to 3, 66.7% to 100.0% of the energy"),
                ("out", "1 layer: keeps 0 of 0, 100.0% of the energy"),
            ]
        );
        // At the second of three places, the curves are at 1/2 and at nothing, which is drawn at the bottom.
        let half = HEIGHT * 2f64.log10() / DECADES;
        assert!(plots[0].svg.contains(&format!("L100.0 {half:.1}L")), "{}", plots[0].svg);
        assert!(plots[0].svg.contains(&format!("L100.0 {HEIGHT:.1}L")), "{}", plots[0].svg);
        // Between the cuts after the first and the second.
        assert!(plots[0].svg.contains(r#"x="66.7" width="66.7""#), "{}", plots[0].svg);
    }

    #[test]
    fn many_modules_become_kinds_of_blocks() {
        let one = SingularValues { values: vec![1.0], kept: 1 };
        let names: Vec<String> =
            (0..30).map(|i| format!("blocks.0.module{i}")).chain(["out".into()]).collect();
        let all: Vec<_> = names.iter().map(|name| (name.as_str(), &one)).collect();
        let captions: Vec<_> = spectra(&all, "keeps").into_iter().map(|plot| plot.caption).collect();
        assert_eq!(captions, ["blocks.*", "outside blocks"]);
    }
}
