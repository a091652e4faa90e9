//! What a pull or a load shows while it works: bars on a terminal, lines elsewhere.

use std::collections::HashMap;
use std::io::{IsTerminal, Write, stderr};
use std::sync::{Mutex, PoisonError};

use hull_images::{Digest, Progress, Silent, Step};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// The way to show progress that suits stderr, or none.
pub(crate) fn progress(quiet: bool) -> Box<dyn Progress> {
    if quiet {
        Box::new(Silent)
    } else if stderr().is_terminal() {
        Box::new(Bars::default())
    } else {
        Box::new(Lines)
    }
}

/// One line for each change, for logs.
#[derive(Debug)]
struct Lines;

impl Progress for Lines {
    fn step(&self, layer: &Digest, step: Step) {
        let text = match step {
            Step::Waiting { .. } => "Pulling fs layer".to_owned(),
            Step::Retrying { attempt, reason } => format!("Retrying (attempt {attempt}): {reason}"),
            Step::Downloaded => "Download complete".to_owned(),
            Step::Ready => "Pull complete".to_owned(),
            Step::Downloading { .. } | Step::Unpacking { .. } => return,
        };
        // Progress that can't be shown is no reason to stop.
        let _ = writeln!(stderr(), "{}: {text}", layer.short());
    }
}

/// One bar for each layer.
#[derive(Debug)]
struct Bars {
    all: MultiProgress,
    layers: Mutex<HashMap<Digest, ProgressBar>>,
}

impl Default for Bars {
    fn default() -> Self {
        Self {
            all: MultiProgress::with_draw_target(ProgressDrawTarget::stderr()),
            layers: Mutex::default(),
        }
    }
}

impl Bars {
    fn bar(&self, layer: &Digest) -> ProgressBar {
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        let made = layers.entry(layer.clone()).or_insert_with(|| {
            let bar = self.all.add(ProgressBar::new(0));
            bar.set_style(words());
            bar.set_prefix(layer.short().to_owned());
            bar
        });
        made.clone()
    }
}

impl Progress for Bars {
    fn layers(&self, layers: &[(Digest, u64)]) {
        for (layer, _) in layers {
            self.bar(layer);
        }
    }

    fn step(&self, layer: &Digest, step: Step) {
        let bar = self.bar(layer);
        match step {
            Step::Waiting { .. } => say(&bar, "Waiting"),
            Step::Downloading {
                done_bytes,
                total_bytes,
            } => {
                draw(&bar, "Downloading", done_bytes, total_bytes);
            }
            Step::Retrying { attempt, reason } => {
                say(&bar, format!("Retrying (attempt {attempt}): {reason}"));
            }
            Step::Downloaded => say(&bar, "Download complete"),
            Step::Unpacking {
                done_bytes,
                total_bytes,
            } => {
                draw(&bar, "Extracting", done_bytes, total_bytes);
            }
            Step::Ready => {
                bar.set_style(words());
                bar.finish_with_message("Pull complete");
            }
        }
    }
}

fn say(bar: &ProgressBar, text: impl Into<String>) {
    bar.set_style(words());
    bar.set_message(text.into());
}

fn draw(bar: &ProgressBar, text: &'static str, done: u64, total: u64) {
    bar.set_style(measured());
    bar.set_length(total);
    bar.set_message(text);
    bar.set_position(done);
}

fn words() -> ProgressStyle {
    style("{prefix}: {msg}")
}

fn measured() -> ProgressStyle {
    style("{prefix}: {msg:11} [{bar:40}] {decimal_bytes}/{decimal_total_bytes}")
        .progress_chars("=> ")
}

fn style(template: &str) -> ProgressStyle {
    // A template that is wrong shows the plain bar; the test keeps them right.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_styles_are_valid() {
        for template in [
            "{prefix}: {msg}",
            "{prefix}: {msg:11} [{bar:40}] {decimal_bytes}/{decimal_total_bytes}",
        ] {
            assert!(ProgressStyle::with_template(template).is_ok());
        }
    }

    #[test]
    fn every_step_can_be_shown() {
        let layer = Digest::of(b"layer");
        let bars = Bars {
            all: MultiProgress::with_draw_target(ProgressDrawTarget::hidden()),
            layers: Mutex::default(),
        };
        bars.layers(&[(layer.clone(), 10)]);
        for step in [
            Step::Waiting { total_bytes: 10 },
            Step::Downloading {
                done_bytes: 5,
                total_bytes: 10,
            },
            Step::Retrying {
                attempt: 2,
                reason: "reset".into(),
            },
            Step::Downloaded,
            Step::Unpacking {
                done_bytes: 3,
                total_bytes: 10,
            },
            Step::Ready,
        ] {
            bars.step(&layer, step);
        }
        assert!(bars.bar(&layer).is_finished());
    }
}
