//! Compiled filters, run by a small machine, against the profile read literally.

use proptest::prelude::*;
use serde_json::json;

use super::*;

/// Runs a program on a call, as the kernel does.
fn run(program: &[sock_filter], arch: u32, number: u32, arguments: [u64; 6]) -> u32 {
    let mut accumulator = 0u32;
    let mut at = 0;
    loop {
        let step = program[at];
        at += 1;
        let by = |holds: bool| usize::from(if holds { step.jt } else { step.jf });
        match step.code {
            LOAD => {
                accumulator = match step.k {
                    NUMBER => number,
                    ARCHITECTURE => arch,
                    k => {
                        let word = (k - ARGUMENTS) / 4;
                        let argument = arguments[word as usize / 2];
                        (argument >> (32 * (word % 2))) as u32
                    }
                }
            }
            AND => accumulator &= step.k,
            ALWAYS => at += step.k as usize,
            EQUAL => at += by(accumulator == step.k),
            GREATER => at += by(accumulator > step.k),
            AT_LEAST => at += by(accumulator >= step.k),
            RETURN => return step.k,
            code => panic!("instruction {code}"),
        }
    }
}

fn compile(profile: serde_json::Value) -> Filter {
    Filter::of(&serde_json::from_value(profile).unwrap()).unwrap()
}

fn call(filter: &Filter, name: &str, arguments: [u64; 6]) -> u32 {
    let number = syscalls::number(name).unwrap();
    run(&filter.program, AUDIT_ARCH_X86_64, number, arguments)
}

const EPERM: u32 = 0x0005_0001;

#[test]
fn an_engines_profile_allows_what_it_lists() {
    let filter = compile(json!({
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "syscalls": [
            {"names": ["read", "write", "openat", "no_such_call"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
            {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": [
                {"index": 0, "value": 2114060288u64, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]},
            {"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [
                {"index": 0, "value": 0, "op": "SCMP_CMP_EQ"},
                {"index": 0, "value": 0xffff_ffffu64, "op": "SCMP_CMP_EQ"}]},
        ]
    }));
    assert_eq!(call(&filter, "write", [0; 6]), ALLOW);
    assert_eq!(call(&filter, "mount", [0; 6]), EPERM);
    assert_eq!(call(&filter, "clone3", [0; 6]), ENOSYS);
    assert_eq!(call(&filter, "clone", [0x11, 0, 0, 0, 0, 0]), ALLOW);
    assert_eq!(call(&filter, "clone", [0x1000_0000, 0, 0, 0, 0, 0]), EPERM);
    assert_eq!(
        call(&filter, "personality", [0xffff_ffff, 0, 0, 0, 0, 0]),
        ALLOW
    );
    assert_eq!(call(&filter, "personality", [8, 0, 0, 0, 0, 0]), EPERM);
    // Newer than all that the profile names.
    assert_eq!(call(&filter, "mseal", [0; 6]), ENOSYS);
    // i386, which is listed, and aarch64, which isn't.
    assert_eq!(run(&filter.program, 0x4000_0003, 4, [0; 6]), ENOSYS);
    assert_eq!(
        run(&filter.program, AUDIT_ARCH_X86_64, X32 | 1, [0; 6]),
        ENOSYS
    );
}

#[test]
fn foreign_calls_that_are_not_listed_end_the_process() {
    let filter = compile(json!({"defaultAction": "SCMP_ACT_ALLOW"}));
    assert_eq!(run(&filter.program, 0x4000_0003, 4, [0; 6]), KILL_PROCESS);
    assert_eq!(call(&filter, "mseal", [0; 6]), ALLOW);
}

#[test]
fn notification_and_a_seventh_argument_are_refused() {
    for profile in [
        json!({"defaultAction": "SCMP_ACT_NOTIFY"}),
        json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"],
            "action": "SCMP_ACT_ERRNO",
            "args": [{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}]}]}),
    ] {
        assert!(Filter::of(&serde_json::from_value(profile).unwrap()).is_err());
    }
}

const OPERATORS: [&str; 7] = [
    "SCMP_CMP_NE",
    "SCMP_CMP_LT",
    "SCMP_CMP_LE",
    "SCMP_CMP_EQ",
    "SCMP_CMP_GE",
    "SCMP_CMP_GT",
    "SCMP_CMP_MASKED_EQ",
];

fn holds(operator: &str, argument: u64, value: u64, two: u64) -> bool {
    match operator {
        "SCMP_CMP_NE" => argument != value,
        "SCMP_CMP_LT" => argument < value,
        "SCMP_CMP_LE" => argument <= value,
        "SCMP_CMP_EQ" => argument == value,
        "SCMP_CMP_GE" => argument >= value,
        "SCMP_CMP_GT" => argument > value,
        _ => argument & value == two,
    }
}

/// Values that meet each other's halves often.
fn word() -> impl Strategy<Value = u64> {
    (0u64..3, 0u64..3).prop_map(|(high, low)| (high << 32) | low)
}

proptest! {
    #[test]
    fn conditions_mean_what_they_say(
        conditions in proptest::collection::vec((0..OPERATORS.len(), word(), word()), 1..=6),
        arguments: [u8; 6], words in proptest::collection::vec(word(), 6),
    ) {
        let _ = arguments;
        let args: Vec<_> = conditions.iter().enumerate().map(|(index, (operator, value, two))| {
            json!({"index": index, "value": value, "valueTwo": two, "op": OPERATORS[*operator]})
        }).collect();
        let filter = compile(json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["ioctl"], "action": "SCMP_ACT_ERRNO", "args": args}]}));
        let expected = conditions.iter().zip(&words).all(|((operator, value, two), word)| {
            holds(OPERATORS[*operator], *word, *value, *two)
        });
        let words: [u64; 6] = words.try_into().unwrap();
        prop_assert_eq!(call(&filter, "ioctl", words), if expected { EPERM } else { ALLOW });
        prop_assert_eq!(call(&filter, "read", words), ALLOW);
    }

    #[test]
    fn every_number_gets_its_own_verdict(
        listed in proptest::collection::btree_map(0u32..470, 0u32..3, 0..200),
        default in 3u32..5,
    ) {
        let verdicts: BTreeMap<_, _> = listed
            .iter()
            .map(|(&number, &action)| (number, Verdict::Always(action)))
            .collect();
        let newest = listed.keys().next_back().copied();
        let mut program = vec![instruction(LOAD, NUMBER)];
        search(&ranges(&verdicts, default, newest.map(|n| (n, 9))), default, &mut program);
        for number in 0..480 {
            let beyond = if newest.is_some_and(|newest| number > newest) { 9 } else { default };
            let expected = listed.get(&number).copied().unwrap_or(beyond);
            prop_assert_eq!(run(&program, 0, number, [0; 6]), expected);
        }
    }
}
