//! A flame graph as an SVG that needs nothing else: a box for each function, as wide as its share
//! of the samples, standing on the function that called it. What a box is, its tooltip says.

use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Tenths of a pixel: no float is needed.
const WIDTH: u64 = 12_000;
const ROW: u64 = 160;
const TOP: u64 = 320;
/// A character of the font.
const CHARACTER: u64 = 66;
/// Boxes narrower than this are left out; the tooltip of what is below has their samples.
const WIDTH_MIN: u64 = 2;
/// Deeper stacks are cut.
const DEPTH_MAX: usize = 200;

/// A function, by who called it.
#[derive(Default)]
struct Node {
    samples: u64,
    called: BTreeMap<String, Node>,
}

impl Node {
    fn add(&mut self, names: &[String], samples: u64) {
        self.samples += samples;
        if let Some((first, rest)) = names.split_first() {
            let called = self.called.entry(first.clone()).or_default();
            called.add(rest, samples);
        }
    }

    fn depth(&self) -> u64 {
        let above = self.called.values().map(|node| 1 + node.depth());
        above.max().unwrap_or(0)
    }
}

/// Draws stacks, outermost function first, with how often each was seen.
pub(super) fn draw(title: &str, stacks: impl Iterator<Item = (Vec<String>, u64)>) -> String {
    let mut all = Node::default();
    for (mut names, samples) in stacks {
        names.truncate(DEPTH_MAX);
        all.add(&names, samples);
    }
    let height = TOP + (all.depth() + 2) * ROW;
    let mut svg = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
         <svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {}\" width=\"100%\" \
         font-family=\"monospace\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"4\" y=\"20\" font-size=\"13\">{}</text>\n",
        tenths(WIDTH),
        tenths(height),
        escaped(title)
    );
    let mut drawing = Drawing {
        svg: &mut svg,
        total: all.samples.max(1),
    };
    drawing.node("all", &all, 0, height - ROW);
    svg += "</svg>\n";
    svg
}

struct Drawing<'s> {
    svg: &'s mut String,
    total: u64,
}

impl Drawing<'_> {
    /// A box whose left edge is where `before` samples end, and all that stands on it.
    fn node(&mut self, name: &str, node: &Node, before: u64, y: u64) {
        let at = |samples: u64| samples * WIDTH / self.total;
        let (left, width) = (at(before), at(before + node.samples) - at(before));
        if width < WIDTH_MIN {
            return;
        }
        let share = node.samples * 10_000 / self.total;
        let room = usize::try_from(width.saturating_sub(40) / CHARACTER).unwrap_or(0);
        let shown: String = name.chars().take(room).collect();
        // Writing to memory cannot fail.
        let _ = writeln!(
            self.svg,
            "<g><title>{} ({} samples, {}.{:02} %)</title><rect x=\"{}\" y=\"{}\" width=\"{}\" \
             height=\"15\" rx=\"1\" fill=\"{}\"/><text x=\"{}\" y=\"{}\">{}</text></g>",
            escaped(name),
            node.samples,
            share / 100,
            share % 100,
            tenths(left),
            tenths(y),
            tenths(width),
            colour(name),
            tenths(left + 20),
            tenths(y + 115),
            if room < 3 {
                String::new()
            } else {
                escaped(&shown)
            },
        );
        let mut before = before;
        for (name, called) in &node.called {
            self.node(name, called, before, y - ROW);
            before += called.samples;
        }
    }
}

fn tenths(value: u64) -> String {
    format!("{}.{}", value / 10, value % 10)
}

/// Warm, and always the same for a function.
fn colour(name: &str) -> String {
    let sum = name.bytes().fold(7_u32, |sum, byte| {
        sum.wrapping_mul(31).wrapping_add(byte.into())
    });
    format!("rgb({},{},{})", 205 + sum % 50, 90 + sum / 50 % 130, 55)
}

fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            control if control.is_control() => out.push(' '),
            other => out.push(other),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stack(names: &[&str], samples: u64) -> (Vec<String>, u64) {
        (
            names.iter().map(|name| (*name).to_owned()).collect(),
            samples,
        )
    }

    #[test]
    fn widths_are_shares_and_the_same_calls_are_one_box() {
        let stacks = [
            stack(&["worker", "serve", "parse<&[u8]>"], 1),
            stack(&["worker", "serve", "write"], 2),
            stack(&["worker", "serve"], 1),
        ];
        let svg = draw("a & b", stacks.into_iter());
        assert!(svg.contains("a &amp; b"));
        assert_eq!(svg.matches("<title>serve (4 samples, 100.00 %)").count(), 1);
        assert!(svg.contains("<title>parse&lt;&amp;[u8]&gt; (1 samples, 25.00 %)"));
        assert!(svg.contains("<title>write (2 samples, 50.00 %)</title><rect x=\"300.0\""));
        assert!(svg.contains("width=\"600.0\""));
    }

    #[test]
    fn nothing_seen_is_an_empty_graph_and_deep_stacks_are_cut() {
        assert!(draw("t", std::iter::empty()).ends_with("</svg>\n"));
        let deep = (vec!["f".to_owned(); 10_000], 1);
        assert_eq!(
            draw("t", std::iter::once(deep))
                .matches("<title>f ")
                .count(),
            DEPTH_MAX
        );
    }
}
