//! Variables, working directory, host name.

use super::{Case, Expect, sh};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = variables();
    cases.extend(places());
    cases
}

fn variables() -> Vec<Case> {
    vec![
        sh(
            "variables_are_the_images_and_the_callers",
            "echo \"$FROM_IMAGE|$A|$PATH\"",
        )
        .env("A", "1  2")
        .prints(format!("yes|1  2|{}\n", crate::image::PATH)),
        sh("a_variable_of_the_image_is_overridden", "echo $FROM_IMAGE")
            .env("FROM_IMAGE", "no=more")
            .prints("no=more\n"),
        sh(
            "a_variable_of_the_image_is_removed",
            "echo ${FROM_IMAGE-unset}",
        )
        .with(|setup| setup.env.push(("FROM_IMAGE".into(), None)))
        .prints("unset\n"),
        sh(
            "values_can_have_lines_quotes_and_any_letters",
            "printf '%s|%s' \"$M\" \"$E\"",
        )
        .env("M", "one\n two\t\"three\"\n")
        .env("E", "")
        .prints("one\n two\t\"three\"\n|"),
        sh(
            "a_file_of_variables_is_read",
            "echo \"$ONE|$TWO|$THREE|$FROM_IMAGE\"",
        )
        .only_hull("crun has no such files")
        .with(|setup| setup.env_file = Some("# a comment\nONE=1\nTWO=a b = c\n\nFROM_IMAGE=file\n"))
        .env("THREE", "3")
        .prints("1|a b = c|3|file\n"),
        sh(
            "the_host_name_is_a_variable_too",
            "test \"$HOSTNAME\" = \"$(hostname)\" && echo $HOSTNAME",
        )
        .with(|setup| setup.hostname = Some("box-7"))
        .prints("box-7\n"),
        sh(
            "a_host_name_is_in_etc",
            "cat /etc/hostname; grep -c -w box-7 /etc/hosts; test -e /etc/resolv.conf",
        )
        .only_hull("a bundle brings these files itself")
        .with(|setup| setup.hostname = Some("box-7"))
        .prints("box-7\n1\n"),
    ]
}

fn places() -> Vec<Case> {
    vec![
        sh("without_a_working_directory_it_is_the_root", "pwd").prints("/\n"),
        sh("the_working_directory_is_entered", "pwd; cat plain")
            .with(|setup| setup.cwd = Some("/srv"))
            .prints("/srv\nnot a program\n"),
        sh(
            "a_missing_working_directory_is_made",
            "pwd; stat -c '%u:%g %a' .",
        )
        .with(|setup| setup.cwd = Some("/made/for/it"))
        .prints("/made/for/it\n0:0 755\n"),
        sh("the_kernel_is_not_the_hosts", "uname -r")
            .only_hull("crun's containers share the host's kernel")
            .stdout(Expect::Holds("it differs from the host's", |said| {
                let own = std::fs::read_to_string("/proc/sys/kernel/osrelease");
                !said.trim().is_empty() && own.is_ok_and(|own| own.trim() != said.trim())
            })),
    ]
}
