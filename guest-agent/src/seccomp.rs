//! System call filters of the OCI runtime spec, compiled for the kernel.
//!
//! Owns: turning `linux.seccomp` into one classic BPF program (seccomp(2)): a binary search over
//! the call's number, then its conditions. Refuses: user notification. Calls of other
//! architectures aren't filtered one by one: those that the profile lists get ENOSYS, as on a
//! kernel without them, all others end the process.

use std::collections::BTreeMap;
use std::fmt;

use libc::sock_filter;

use crate::fault::{Fault, Tried};
use crate::spec::{Action, Condition, Operator, Seccomp, Syscalls};
use crate::{sys, syscalls};

const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
/// Numbers from here on are the x32 variant's.
const X32: u32 = 0x4000_0000;
const ENOSYS: u32 = 0x0005_0000 | libc::ENOSYS as u32;
const KILL_PROCESS: u32 = 0x8000_0000;
const ALLOW: u32 = 0x7fff_0000;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
const AND: u16 = (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16;
const ALWAYS: u16 = (libc::BPF_JMP | libc::BPF_JA) as u16;
const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const GREATER: u16 = (libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K) as u16;
const AT_LEAST: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;

/// A compiled filter.
#[derive(Clone)]
pub(crate) struct Filter {
    program: Vec<sock_filter>,
    flags: u64,
}

impl fmt::Debug for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Filter({} instructions)", self.program.len())
    }
}

/// What to do when all of its conditions hold.
#[derive(Debug, Clone, PartialEq)]
struct Rule {
    conditions: Vec<Condition>,
    action: u32,
}

/// What to do about one call: the first rule that holds, else the default.
#[derive(Debug, Clone, PartialEq)]
enum Verdict {
    Always(u32),
    Depends(Vec<Rule>),
}

impl Filter {
    /// Compiles a profile.
    ///
    /// # Errors
    /// Refuses what can't be filtered, by name.
    pub(crate) fn of(spec: &Seccomp) -> Result<Self, Fault> {
        let default = value_of(spec.default_action, spec.default_errno_ret)?;
        let mut verdicts = BTreeMap::new();
        for entry in &spec.syscalls {
            add(&mut verdicts, entry, default)?;
        }
        let newest = verdicts.keys().next_back().copied();
        // What came after the profile was written is unknown to it, not forbidden.
        let beyond = if default == ALLOW { ALLOW } else { ENOSYS };
        let ranges = ranges(&verdicts, default, newest.map(|newest| (newest, beyond)));
        let mut program = preamble(&spec.architectures);
        search(&ranges, default, &mut program);
        if program.len() > libc::BPF_MAXINSNS as usize {
            return Err(Fault::refused(format!(
                "the seccomp profile needs {} instructions, the kernel takes {}",
                program.len(),
                libc::BPF_MAXINSNS
            )));
        }
        let mut flags = spec.flags.iter();
        let flags = flags.try_fold(0, |flags, flag| Ok(flags | flag_value(flag)?))?;
        Ok(Self { program, flags })
    }

    /// Installs it for this process, for good.
    ///
    /// # Errors
    /// If the process is neither privileged nor without new privileges.
    pub(crate) fn install(&self) -> Result<(), Fault> {
        sys::install_filter(&self.program, self.flags)
            .or_refuse(|| "cannot install the seccomp filter")
    }
}

fn flag_value(flag: &str) -> Result<u64, Fault> {
    match flag {
        "SECCOMP_FILTER_FLAG_LOG" => Ok(libc::SECCOMP_FILTER_FLAG_LOG),
        "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => Ok(libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW),
        // There is one thread, and nobody to be notified.
        "SECCOMP_FILTER_FLAG_TSYNC" | "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV" => Ok(0),
        unknown => Err(Fault::refused(format!("no seccomp flag {unknown:?}"))),
    }
}

/// The kernel's word for an action (seccomp(2)); `errno` is the number that it hands on.
fn value_of(action: Action, errno: Option<u32>) -> Result<u32, Fault> {
    let data = errno.map_or(libc::EPERM as u32, |errno| errno & 0xffff);
    Ok(match action {
        Action::KillThread => 0,
        Action::KillProcess => KILL_PROCESS,
        Action::Trap => 0x0003_0000,
        Action::Errno => 0x0005_0000 | data,
        Action::Trace => 0x7ff0_0000 | data,
        Action::Log => 0x7ffc_0000,
        Action::Allow => ALLOW,
        Action::Notify => {
            return Err(Fault::refused("seccomp user notification is not supported"));
        }
    })
}

fn add(verdicts: &mut BTreeMap<u32, Verdict>, entry: &Syscalls, default: u32) -> Result<(), Fault> {
    let action = value_of(entry.action, entry.errno_ret)?;
    let conditions = entry.args.as_slice();
    if conditions.iter().any(|condition| condition.index > 5) {
        return Err(Fault::refused(
            "seccomp condition on an argument past the sixth",
        ));
    }
    // Names that this kernel doesn't have need no rule.
    for number in entry.names.iter().filter_map(|name| syscalls::number(name)) {
        if conditions.is_empty() {
            // Unconditional rules win over conditional ones, the first of them over later ones.
            match verdicts.get(&number) {
                Some(Verdict::Always(_)) => {}
                _ => drop(verdicts.insert(number, Verdict::Always(action))),
            }
        } else if action != default {
            let verdict = verdicts
                .entry(number)
                .or_insert_with(|| Verdict::Depends(Vec::new()));
            if let Verdict::Depends(rules) = verdict {
                rules.extend(alternatives(conditions, action));
            }
        }
    }
    Ok(())
}

/// Conditions on different arguments must all hold; several on the same one are alternatives, as
/// the runtimes read them.
fn alternatives(conditions: &[Condition], action: u32) -> Vec<Rule> {
    let mut seen = [false; 6];
    let repeated = conditions.iter().any(|condition| {
        seen.get_mut(condition.index as usize)
            .is_some_and(|seen| std::mem::replace(seen, true))
    });
    let rule = |conditions: &[Condition]| Rule {
        conditions: conditions.to_vec(),
        action,
    };
    if repeated {
        conditions.chunks(1).map(rule).collect()
    } else {
        vec![rule(conditions)]
    }
}

/// Verdicts for all numbers, each from its first number up to the next one's.
fn ranges(
    verdicts: &BTreeMap<u32, Verdict>,
    default: u32,
    newest: Option<(u32, u32)>,
) -> Vec<(u32, Verdict)> {
    let mut ranges = vec![(0, Verdict::Always(default))];
    let mut push = |first: u32, verdict: Verdict| match ranges.last_mut() {
        Some((at, last)) if *at == first => *last = verdict,
        Some((_, last)) if *last == verdict => {}
        _ => ranges.push((first, verdict)),
    };
    for (&number, verdict) in verdicts {
        push(number, verdict.clone());
        push(number + 1, Verdict::Always(default));
    }
    if let Some((newest, beyond)) = newest {
        push(newest + 1, Verdict::Always(beyond));
    }
    // Replacing a gap's default can leave equal neighbours.
    ranges.dedup_by(|later, earlier| later.1 == earlier.1);
    ranges
}

fn instruction(code: u16, k: u32) -> sock_filter {
    jump(code, k, 0, 0)
}

fn jump(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

fn preamble(architectures: &[String]) -> Vec<sock_filter> {
    let listed = architectures.iter().any(|name| name == "SCMP_ARCH_X86");
    let foreign = if listed { ENOSYS } else { KILL_PROCESS };
    vec![
        instruction(LOAD, ARCHITECTURE),
        jump(EQUAL, AUDIT_ARCH_X86_64, 1, 0),
        instruction(RETURN, foreign),
        instruction(LOAD, NUMBER),
        jump(AT_LEAST, X32, 0, 1),
        instruction(RETURN, ENOSYS),
    ]
}

/// Appends code that finds the range of the loaded number and returns its verdict.
fn search(ranges: &[(u32, Verdict)], default: u32, program: &mut Vec<sock_filter>) {
    let (low, high) = ranges.split_at(ranges.len() / 2);
    let (Some(_), Some((first, _))) = (low.first(), high.first()) else {
        if let Some((_, verdict)) = ranges.first() {
            decide(verdict, default, program);
        }
        return;
    };
    let mut below = Vec::new();
    search(low, default, &mut below);
    match u8::try_from(below.len()) {
        Ok(over) => program.push(jump(AT_LEAST, *first, over, 0)),
        Err(_) => {
            program.push(jump(AT_LEAST, *first, 0, 1));
            // A program past the kernel's limit is refused as a whole.
            program.push(instruction(ALWAYS, below.len() as u32));
        }
    }
    program.append(&mut below);
    search(high, default, program);
}

fn decide(verdict: &Verdict, default: u32, program: &mut Vec<sock_filter>) {
    match verdict {
        Verdict::Always(action) => program.push(instruction(RETURN, *action)),
        Verdict::Depends(rules) => {
            for rule in rules {
                check_rule(rule, program);
            }
            program.push(instruction(RETURN, default));
        }
    }
}

/// Where a jump of a condition leads.
#[derive(Debug, Clone, Copy)]
enum To {
    /// On with the next instruction.
    Next,
    /// Past this condition: it holds.
    Holds,
    /// Past this rule: it doesn't.
    Fails,
}

enum Step {
    Plain(u16, u32),
    Jump(u16, u32, To, To),
}

fn check_rule(rule: &Rule, program: &mut Vec<sock_filter>) {
    let conditions: Vec<Vec<Step>> = rule.conditions.iter().map(steps).collect();
    let mut left: usize = conditions.iter().map(Vec::len).sum();
    for condition in &conditions {
        for (at, step) in condition.iter().enumerate() {
            left -= 1;
            let offset = |to: To| match to {
                To::Next => 0,
                To::Holds => condition.len() - at - 1,
                // Over the rest of the conditions and the return.
                To::Fails => left + 1,
            };
            // Six conditions of at most six steps: every offset fits.
            let short = |to: To| u8::try_from(offset(to)).unwrap_or(u8::MAX);
            program.push(match *step {
                Step::Plain(code, k) => instruction(code, k),
                Step::Jump(code, k, yes, no) => jump(code, k, short(yes), short(no)),
            });
        }
    }
    program.push(instruction(RETURN, rule.action));
}

/// Code for one condition on a 64-bit argument, in two halves.
fn steps(condition: &Condition) -> Vec<Step> {
    use Operator as Op;
    use Step::{Jump, Plain};
    let at = ARGUMENTS + 8 * condition.index;
    let (load_low, load_high) = (Plain(LOAD, at), Plain(LOAD, at + 4));
    let value = condition.value;
    let (low, high) = (value as u32, (value >> 32) as u32);
    match condition.op {
        Op::Equal => vec![
            load_high,
            Jump(EQUAL, high, To::Next, To::Fails),
            load_low,
            Jump(EQUAL, low, To::Next, To::Fails),
        ],
        Op::NotEqual => vec![
            load_high,
            Jump(EQUAL, high, To::Next, To::Holds),
            load_low,
            Jump(EQUAL, low, To::Fails, To::Next),
        ],
        Op::MaskedEqual => {
            let wanted = condition.value_two;
            vec![
                load_high,
                Plain(AND, high),
                Jump(EQUAL, (wanted >> 32) as u32, To::Next, To::Fails),
                load_low,
                Plain(AND, low),
                Jump(EQUAL, wanted as u32, To::Next, To::Fails),
            ]
        }
        op => {
            // Greater in the high half decides; equal there leaves it to the low half.
            let low_test = if matches!(op, Op::Greater | Op::AtMost) {
                GREATER
            } else {
                AT_LEAST
            };
            let (above, below) = if matches!(op, Op::Greater | Op::AtLeast) {
                (To::Holds, To::Fails)
            } else {
                (To::Fails, To::Holds)
            };
            vec![
                load_high,
                Jump(GREATER, high, above, To::Next),
                Jump(EQUAL, high, To::Next, below),
                load_low,
                Jump(low_test, low, above, below),
            ]
        }
    }
}

#[cfg(test)]
mod tests;
