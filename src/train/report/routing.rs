//! The routing of the final model, drawn.

use super::{LayerRouting, RoutingAnalysis};
use crate::plot::format::{fixed, percent};
use crate::plot::page::figure;
use crate::plot::{Axis, Bar, Bars, Columns, ColumnsRow, Heatmap, Mark};

/// Heading and figures of what routed how, as HTML.
pub fn section(routing: &RoutingAnalysis) -> String {
    let layers: Vec<&LayerRouting> = routing.layers.iter().filter(|l| !l.utilisation_e.is_empty()).collect();
    let mut out = String::from(
        "<h3>Utilisation: each expert's share of a layer's rows, expert 0 on top, dashes at equal shares</h3>\n\
         <div class=\"small\">\n",
    );
    let ends = || layers.iter().flat_map(|l| &l.utilisation_e).map(|share| 100.0 * share);
    let axis = Axis::from_zero("", ends());
    for layer in &layers {
        let std = fixed(layer.utilisation_std, 3);
        out += &figure(&format!("layer {} <span>% of rows, std {std}</span>", layer.layer), &utilisation(layer, &axis));
    }
    out += "</div>\n<div class=\"charts packed\">\n";
    if let Some(drawing) = experts_per_token(&layers) {
        let caption = "<b>Experts per token</b>: how often a token used so many; each row is scaled to its peak";
        out += &figure(caption, &drawing);
    }
    for layer in layers.iter().filter(|l| !l.classes.is_empty()) {
        let caption = format!(
            "<b>Expert by token class, layer {}</b>: share of the class' rows that the expert computes. Classes stand with \
             their share of tokens; entropy {}",
            layer.layer,
            fixed(layer.entropy, 2)
        );
        out += &figure(&caption, &classes(layer));
    }
    out + "</div>\n"
}

fn utilisation(layer: &LayerRouting, axis: &Axis) -> String {
    let rows = layer.utilisation_e.iter().enumerate().map(|(e, share)| Bar {
        name: String::new(),
        value: 100.0 * share,
        interval: None,
        mark: Mark::of(0),
        text: String::new(),
        tooltip: format!("layer {}, expert {e}: {} % of rows", layer.layer, percent(*share)),
    });
    let even = 100.0 / layer.utilisation_e.len() as f64;
    let label = format!("layer {}: utilisation of every expert", layer.layer);
    Bars { label, axis: axis.clone(), rows: rows.collect(), guide: Some(even), small: true }.svg()
}

/// A histogram of all layers together and, where there are several, one of each.
fn experts_per_token(layers: &[&LayerRouting]) -> Option<String> {
    let length = layers.iter().map(|l| l.k_histogram.len()).max()?;
    let all: Vec<u64> = (0..length).map(|k| layers.iter().filter_map(|l| l.k_histogram.get(k)).sum()).collect();
    let row = |name: String, histogram: &[u64], mark: Mark| {
        let tokens = histogram.iter().sum::<u64>().max(1) as f64;
        ColumnsRow { name, shares: histogram.iter().map(|n| *n as f64 / tokens).collect(), mark }
    };
    let mut rows = Vec::new();
    if layers.len() > 1 {
        rows.push(row("all layers".into(), &all, Mark { series: None, ..Mark::of(0) }));
    }
    rows.extend(layers.iter().map(|l| row(format!("layer {}", l.layer), &l.k_histogram, Mark::of(0))));
    let label = "how often each number of experts was used, by layer".into();
    Some(Columns { label, x_title: "experts used".into(), what: "of tokens".into(), rows }.svg())
}

/// Classes by experts; a class stands with its share of the tokens.
fn classes(layer: &LayerRouting) -> String {
    let all = layer.classes.iter().map(|c| c.tokens as f64).sum::<f64>().max(1.0);
    let rows = layer.classes.iter().map(|c| {
        let of_all = match 100.0 * c.tokens as f64 / all {
            few if few < 1.0 => "<1%".into(),
            many => format!("{many:.0}%"),
        };
        (format!("{} {of_all}", c.class), c.share_e.clone())
    });
    let label = format!("layer {}: share of each token class that each expert computes", layer.layer);
    Heatmap { label, x_title: "expert".into(), rows: rows.collect() }.svg()
}
