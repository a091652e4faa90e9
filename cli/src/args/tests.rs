//! Every command's words, good and bad.

use clap::CommandFactory;

use super::run::Keys;
use super::*;

fn parse(words: &str) -> Result<Command, clap::Error> {
    Hull::try_parse_from(std::iter::once("hull").chain(words.split_whitespace()))
        .map(|hull| hull.command)
}

fn run(words: &str) -> RunArgs {
    match parse(&format!("run {words}")) {
        Ok(Command::Run(args)) => *args,
        other => panic!("{words}: {other:?}"),
    }
}

#[test]
fn the_definition_is_consistent() {
    Hull::command().debug_assert();
}

#[test]
fn all_after_the_image_is_the_command() {
    let args = run("-it --rm alpine ls --rm -la -e X -- y");
    assert_eq!(
        args.image_and_command,
        ["alpine", "ls", "--rm", "-la", "-e", "X", "--", "y"]
    );
    assert!(args.interactive && args.tty && args.rm && !args.detach);
    assert_eq!(run("-- alpine -x").image_and_command, ["alpine", "-x"]);
}

#[test]
fn flags_take_their_values_in_every_form() {
    let args = run("-m512m --memory=1g -e=A=1 -eB=2 -h name -v/a:/b --pull=always i");
    assert_eq!(args.memory, Some(1 << 30));
    assert_eq!(args.hostname.as_deref(), Some("name"));
    assert_eq!(args.volume.len(), 1);
    assert_eq!(args.pull, PullPolicy::Always);
    let names: Vec<&str> = args
        .process
        .env
        .iter()
        .map(|(name, _)| name.as_str())
        .collect();
    assert_eq!(names, ["A", "B"]);
}

#[test]
fn what_goes_on_from_a_checkpoint_is_as_it_was() {
    let args = run("-d --rm --name n -h host -l a=b --network ns:/n --from /dir");
    assert!(args.from.is_some() && args.image_and_command.is_empty());
    for more in ["alpine", "-e A=1", "-m 1g", "-it", "-v /a:/b"] {
        assert!(parse(&format!("run --from /dir {more}")).is_err(), "{more}");
    }
    assert!(parse("run -d").is_err());
    assert!(parse("fork c -n 0").is_err());
    assert!(matches!(parse("fork -n 3 c"), Ok(Command::Fork(args)) if args.count == 3));
    assert!(
        matches!(parse("checkpoint c d -R"), Ok(Command::Checkpoint(args)) if args.leave_running)
    );
}

#[test]
fn what_docker_defaults_to_is_the_default() {
    let args = run("i");
    assert_eq!(args.pull, PullPolicy::Missing);
    assert_eq!(args.keys.keys, Keys(vec![16, 17]));
    assert!(args.keys.sig_proxy);
    assert!(!run("--sig-proxy=false i").keys.sig_proxy);
    assert!(run("--sig-proxy i").keys.sig_proxy);
    assert!(matches!(parse("kill x"), Ok(Command::Kill(args)) if args.signal == "KILL"));
    assert!(matches!(parse("logs x"), Ok(Command::Logs(args)) if args.tail == Tail(None)));
}

#[test]
fn bad_words_are_refused_with_the_reason() {
    for (words, reason) in [
        ("run", "required arguments were not provided"),
        ("run --nope i", "unexpected argument '--nope'"),
        ("run -m lots i", "invalid suffix: 'lots'"),
        ("run -m 1x i", "invalid suffix: 'x'"),
        ("run --cpus 0 i", "expected more than 0 CPUs"),
        ("run --cpus two i", "is not a number of CPUs"),
        ("run --ulimit pets=1 i", "invalid ulimit type: pets"),
        (
            "run --ulimit nofile=2:1 i",
            "less than or equal to hard limit",
        ),
        ("run -e =x i", "invalid environment variable"),
        ("run -v name:/b i", "named volume"),
        ("run -v /a:b i", "mount path must be absolute"),
        ("run --tmpfs run i", "mount path must be absolute"),
        (
            "run --mount type=nfs,target=/b i",
            "unknown mount type 'nfs'",
        ),
        ("run --stop-signal NOPE i", "invalid signal: NOPE"),
        ("run --stop-timeout soon i", "whole seconds"),
        ("run --pull sometimes i", "invalid value 'sometimes'"),
        ("run --network host i", "--network none or ns:PATH"),
        (
            "run --security-opt seccomp=unconfined i",
            "only 'no-new-privileges' is known",
        ),
        ("run --detach-keys ctrl-1 i", "unknown key"),
        ("run --label =x i", "a label needs a name"),
        ("run --sysctl x i", "NAME=VALUE"),
        ("run --pids-limit many i", "invalid value 'many'"),
        ("exec c", "value"),
        ("kill -s NOPE c", "invalid signal: NOPE"),
        ("stop -s NOPE c", "invalid signal: NOPE"),
        ("logs --tail some c", "expected a number or 'all'"),
        ("logs --since soon c", "expected a duration"),
        ("logs --boot -f c", "cannot be used with"),
        ("stop -t soon c", "whole seconds"),
        ("ps --filter x", "NAME=VALUE"),
        ("stop", "required arguments were not provided"),
        ("rm", "required arguments were not provided"),
        ("dance", "unrecognized subcommand 'dance'"),
    ] {
        let error = parse(words).unwrap_err().to_string();
        assert!(error.contains(reason), "{words}: {error}");
    }
}

#[test]
fn negative_limits_are_values() {
    assert_eq!(run("--pids-limit -1 i").limits.pids_limit, Some(-1));
    assert!(
        matches!(parse("logs --tail=-1 c"), Ok(Command::Logs(args)) if args.tail == Tail(None))
    );
}

#[test]
fn exec_has_a_container_and_a_command() {
    let Ok(Command::Exec(args)) = parse("exec -it -u 1 -w / -e A=1 c ls -la -t") else {
        panic!()
    };
    assert_eq!(args.name_and_command, ["c", "ls", "-la", "-t"]);
    assert!(args.interactive && args.tty && !args.detach);
}

#[test]
fn every_flag_is_described_and_the_help_of_run_fits_a_page() {
    for command in Hull::command().get_subcommands() {
        for argument in command.get_arguments() {
            let described = argument.get_help().is_some();
            assert!(described, "{} {}", command.get_name(), argument.get_id());
        }
    }
    let mut hull = Hull::command();
    let run = hull.find_subcommand_mut("run").unwrap();
    let help = run.render_help().to_string();
    // One description that wraps would put all in lines of their own.
    assert!(help.lines().count() <= 50, "{}", help.lines().count());
}
