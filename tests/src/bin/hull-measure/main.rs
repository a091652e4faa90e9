//! Measures starts and idle sandboxes inside the KVM host, for `cargo xtask bench`.
//!
//! Owns: the order of measurements. An order comes as JSON on stdin, findings leave as JSON on
//! stdout once all is measured, so that nothing talks to the outside meanwhile. Refuses: to
//! judge what it finds.
//!
//! The host counts time in instructions: 2 ns of `CLOCK_MONOTONIC` are one, and an idle wait
//! takes no longer than it says.

mod containerd;
mod crowd;
mod exits;
mod files;
mod idle;
mod layers;
mod memory;
mod programs;
mod timing;

use std::io;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use hull_tests::measure::{Failure, Findings, Order};

use containerd::Containerd;
use exits::Exits;
use programs::{Place, Program};

/// Virtual nanoseconds of one instruction.
const NS_PER_INSTRUCTION: u64 = 2;

/// Starts before those that count, so that every file is in memory.
const WARM: usize = 2;

/// What a start costs, whoever waits for it.
const WHOLE: &str = "run_true_whole_instructions";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hull-measure: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let order: Order = serde_json::from_reader(io::stdin()).context("read the order")?;
    let place = Place(order.place.clone());
    let mut findings = Findings::default();
    let mut is_hung = false;
    for name in &order.programs {
        if is_hung {
            findings.failures.push(Failure {
                program: name.clone(),
                why: "another's guest may be in its way".to_owned(),
            });
            continue;
        }
        let Some(program) = Program::named(name) else {
            findings.failures.push(Failure {
                program: name.clone(),
                why: "no such program".to_owned(),
            });
            continue;
        };
        let mut bench = Bench {
            order: &order,
            place: &place,
            name,
            program,
            findings: &mut findings,
        };
        bench.all();
        is_hung = program.has_guests() && findings.failures.iter().any(|f| f.program == *name);
    }
    serde_json::to_writer(io::stdout(), &findings).context("write the findings")
}

/// One group of figures.
type Part<B> = fn(&mut B) -> Result<()>;

/// One program's measurements.
struct Bench<'a> {
    order: &'a Order,
    place: &'a Place,
    name: &'a str,
    program: Program,
    findings: &'a mut Findings,
}

impl Bench<'_> {
    fn all(&mut self) {
        if self.program == Program::Hull
            && let Err(error) = self.load()
        {
            return self.fail("load the image", &error);
        }
        let parts: [(&str, Part<Self>); 11] = [
            ("time starts", Self::starts),
            ("time restores", Self::restores),
            ("count copied pages", Self::copies),
            ("time processes in a container", Self::execs),
            ("time the first process", Self::first_process),
            ("count exits", Self::exits),
            ("watch an idle sandbox", Self::idle),
            ("read a file twice", Self::files),
            ("go by containerd", Self::by_containerd),
            ("have many read one file", Self::layers),
            ("have a hundred at once", Self::crowd),
        ];
        for (what, part) in parts {
            if let Err(error) = part(self) {
                self.fail(what, &error);
                if self.program.has_guests() {
                    // A guest that hangs takes the processor: all else would be counted with it.
                    return;
                }
            }
        }
    }

    fn fail(&mut self, what: &str, error: &anyhow::Error) {
        self.findings.failures.push(Failure {
            program: self.name.to_owned(),
            why: format!("cannot {what}: {error:#}"),
        });
    }

    fn wants(&self, figures: &[&str]) -> bool {
        let mut wanted = self.order.figures.iter();
        wanted.any(|figure| figures.contains(&figure.as_str()))
    }

    fn add(&mut self, figure: &str, value: f64) {
        if self.wants(&[figure]) {
            self.findings.add(figure, self.name, value);
        }
    }

    fn log(&self) -> std::path::PathBuf {
        self.place.join("stderr")
    }

    fn load(&self) -> Result<()> {
        let image = self.place.join("image.tar").display().to_string();
        let load = self.place.hull(&["load", "-i", &image]);
        timing::time(&load, &self.log()).map(drop)
    }

    /// `true` from exec to exit, and what it has the machine do in all.
    fn starts(&mut self) -> Result<()> {
        for (figure, whole, cold) in [
            ("cold_run_true_instructions", None, true),
            ("run_true_instructions", Some(WHOLE), false),
        ] {
            let wanted = self.wants(&[figure]) || whole.is_some_and(|whole| self.wants(&[whole]));
            if !wanted || self.only_cold(cold) {
                continue;
            }
            let argv = self.place.run_true(self.program, cold);
            for _ in 0..WARM {
                timing::time(&argv, &self.log())?;
            }
            timing::pause()?;
            for _ in 0..self.order.runs {
                let before = timing::worked()?;
                let timing = timing::time(&argv, &self.log())?;
                timing::pause()?;
                self.add(figure, instructions(timing.end));
                if let Some(whole) = whole {
                    self.add(whole, instructions(timing::worked()? - before));
                }
            }
        }
        Ok(())
    }

    /// QEMU has no templates; a container's runtime has but one kind of start.
    fn only_cold(&self, cold: bool) -> bool {
        self.program == Program::Qemu && !cold
    }

    /// From a monitor's first instruction to the answer of an agent that was copied.
    fn restores(&mut self) -> Result<()> {
        let figure = "restore_instructions";
        if self.program != Program::Hull || !self.wants(&[figure]) {
            return Ok(());
        }
        for _ in 0..WARM {
            idle::marks(self.place, false, &self.log())?;
        }
        for _ in 0..self.order.runs {
            let marks = idle::marks(self.place, false, &self.log())?;
            self.add(figure, instructions(marks.ready - marks.monitor));
            let title = "hull: instructions from exec to each stage, from a template".to_owned();
            self.findings.details.insert(title, marks.stages());
        }
        Ok(())
    }

    fn copies(&mut self) -> Result<()> {
        let figure = "run_true_pages_copied";
        if self.program != Program::Hull || !self.wants(&[figure]) {
            return Ok(());
        }
        for _ in 0..WARM {
            idle::marks(self.place, false, &self.log())?;
        }
        for _ in 0..self.order.runs {
            let pages = idle::pages_copied(self.place, &self.log())?;
            self.add(figure, lossless(pages));
        }
        Ok(())
    }

    /// `true` beside a container's first process, from exec to exit.
    fn execs(&mut self) -> Result<()> {
        let figure = "exec_true_instructions";
        if self.program == Program::Qemu || !self.wants(&[figure]) {
            return Ok(());
        }
        let (place, program, log) = (self.place, self.program, self.log());
        idle::beside(place, program, &log, || {
            let argv = place.exec_true(program, idle::NAME);
            for _ in 0..WARM {
                timing::time(&argv, &log)?;
            }
            for _ in 0..self.order.runs {
                let timing = timing::time(&argv, &log)?;
                self.add(figure, instructions(timing.end));
            }
            Ok(())
        })
    }

    /// From exec to the first process of a guest or container. Hull's marks tell when its
    /// agent began; the others' first process rings the doorbell.
    fn first_process(&mut self) -> Result<()> {
        const FIRST: &str = "cold_first_user_instructions";
        const READY: &str = "cold_ready_instructions";
        if !self.wants(&[FIRST, READY, "first_output_instructions"]) {
            return Ok(());
        }
        let argv = self.place.run_bell(self.program);
        for _ in 0..WARM {
            timing::time(&argv, &self.log())?;
        }
        for _ in 0..self.order.runs {
            let rung = timing::time(&argv, &self.log())?.first_byte;
            let rung = instructions(rung.context("the doorbell did not ring")?);
            self.add("first_output_instructions", rung);
            if self.program != Program::Hull {
                self.add(FIRST, rung);
                continue;
            }
            let marks = idle::marks(self.place, true, &self.log())?;
            self.add(FIRST, instructions(marks.agent));
            self.add(READY, instructions(marks.ready));
            let stages = marks.stages();
            let title = "hull: instructions from exec to each stage".to_owned();
            self.findings.details.insert(title, stages);
        }
        Ok(())
    }

    fn exits(&mut self) -> Result<()> {
        const FAULTS: &str = "run_true_faults";
        if matches!(self.program, Program::Runtime(_)) {
            return Ok(());
        }
        for (figure, cold) in [("cold_run_true_exits", true), ("run_true_exits", false)] {
            let wanted = self.wants(&[figure]) || !cold && self.wants(&[FAULTS]);
            if !wanted || self.only_cold(cold) {
                continue;
            }
            let argv = self.place.run_true(self.program, cold);
            timing::time(&argv, &self.log())?;
            for _ in 0..self.order.runs {
                let exits = Exits::count()?;
                timing::time(&argv, &self.log())?;
                let reasons = exits.read()?;
                self.add(figure, reasons.iter().map(|(_, count)| count).sum());
                let fault = reasons.iter().find(|(name, _)| name == exits::FAULT);
                if !cold {
                    self.add(FAULTS, fault.map_or(0.0, |(_, count)| *count));
                }
                let title = format!("{}: {figure} by reason", self.name);
                self.findings.details.insert(title, reasons);
            }
        }
        Ok(())
    }

    fn idle(&mut self) -> Result<()> {
        const FIGURES: [&str; 4] = [
            "monitor_private_bytes",
            "monitor_dirty_bytes",
            "guest_touched_bytes",
            "idle_exits_per_second",
        ];
        if matches!(self.program, Program::Runtime(_)) || !self.wants(&FIGURES) {
            return Ok(());
        }
        // Memory is exact; the seconds are averaged over a minute already.
        for _ in 0..self.order.runs.min(2) {
            let seen = idle::watch(self.place, self.program, &self.log())?;
            self.add("monitor_private_bytes", lossless(seen.memory.private));
            self.add("monitor_dirty_bytes", lossless(seen.memory.dirty));
            self.add("guest_touched_bytes", lossless(seen.memory.guest));
            self.add("idle_exits_per_second", seen.exits_per_second);
            let title = format!("{}: exits of an idle minute by reason", self.name);
            self.findings.details.insert(title, seen.reasons);
        }
        Ok(())
    }

    /// `ctr run` of `true`, and what stays on the host for a container that idles.
    fn by_containerd(&mut self) -> Result<()> {
        const RUN: &str = "ctr_run_true_instructions";
        const KEPT: &str = "ctr_private_bytes";
        let has_shim = matches!(self.program, Program::Hull | Program::Runtime("runc"));
        if !has_shim || !self.wants(&[RUN, KEPT]) {
            return Ok(());
        }
        let log = self.log();
        let mut containerd = Containerd::start(self.place, self.name, &log)?;
        for _ in 0..WARM {
            containerd.run_true(&log)?;
        }
        for _ in 0..self.order.runs {
            let took = containerd.run_true(&log)?;
            self.add(RUN, instructions(took));
        }
        let kept = containerd.private_bytes(&log)?;
        self.add(KEPT, lossless(kept));
        Ok(())
    }

    fn layers(&mut self) -> Result<()> {
        let figure = "layer_copies_at_20";
        if self.program != Program::Hull || !self.wants(&[figure]) {
            return Ok(());
        }
        let growth = layers::growth(self.place, &self.log())?;
        let (file, contents) = (lossless(growth.file), lossless(growth.contents));
        self.add(figure, 1.0 + contents / file);
        let title = "hull: bytes that 20 readers of one file take beyond it".to_owned();
        let details = vec![
            ("the file".to_owned(), file),
            ("contents".to_owned(), contents),
            ("page tables".to_owned(), lossless(growth.tables)),
        ];
        self.findings.details.insert(title, details);
        Ok(())
    }

    fn crowd(&mut self) -> Result<()> {
        let figure = "sandbox_private_bytes_at_100";
        if self.program != Program::Hull || !self.wants(&[figure]) {
            return Ok(());
        }
        let seen = crowd::seen(self.place, &self.log())?;
        self.add(figure, lossless(seen.private));
        let title = "hull: bytes of one of 100 idle sandboxes, in the mean".to_owned();
        let details = [
            (
                "private, of the guest",
                seen.private.saturating_sub(seen.monitor),
            ),
            ("private, the monitor's own", seen.monitor),
            ("the monitor's page tables", seen.tables),
            ("the guest's page tables", seen.nested_tables),
            ("less memory that is available", seen.unavailable),
        ]
        .map(|(name, bytes)| (name.to_owned(), lossless(bytes)));
        self.findings.details.insert(title, details.to_vec());
        Ok(())
    }

    fn files(&mut self) -> Result<()> {
        let figure = "fs_second_pass_requests";
        if self.program != Program::Hull || !self.wants(&[figure]) {
            return Ok(());
        }
        let passes = files::passes(self.place, &self.log())?;
        self.add(figure, lossless(passes.second));
        let title = "hull: requests of the two passes over 256 MiB".to_owned();
        let details = vec![
            ("first".to_owned(), lossless(passes.first)),
            ("second".to_owned(), lossless(passes.second)),
        ];
        self.findings.details.insert(title, details);
        Ok(())
    }
}

fn instructions(nanoseconds: u64) -> f64 {
    lossless(nanoseconds / NS_PER_INSTRUCTION)
}

/// Counts here are far below 2^53.
#[expect(clippy::cast_precision_loss, reason = "counts are below 2^53")]
fn lossless(count: u64) -> f64 {
    count as f64
}

/// Runs a program to its end and gives its stdout.
fn output(argv: &[String], log: &Path) -> Result<String> {
    let (program, arguments) = argv.split_first().context("no program was named")?;
    let errors = std::fs::File::create(log).context("make a log")?;
    let done = std::process::Command::new(program)
        .args(arguments)
        .stderr(errors)
        .output()
        .with_context(|| format!("run {program}"))?;
    if !done.status.success() {
        let words = std::fs::read_to_string(log).unwrap_or_default();
        anyhow::bail!("{} ended with {}: {words}", argv.join(" "), done.status);
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}
