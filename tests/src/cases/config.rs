//! The image's configuration, as Docker reads it.

use super::{Case, case};
use crate::image;

fn configured(name: &'static str, command: &[&str]) -> Case {
    Case {
        image: image::CONFIGURED,
        ..case(name, command).only_hull("a bundle has no image's configuration")
    }
}

pub(super) fn cases() -> Vec<Case> {
    let who =
        "echo $(id -u):$(id -g) $(pwd) $FROM_IMAGE $HOME; cat /data/seed; stat -c '%u %a' /data
               grep -c ' /data ' /proc/self/mountinfo; touch /data/x && echo writable";
    vec![
        configured("entrypoint_and_command_are_joined", &[])
            .prints("entrypoint command of the image\n"),
        configured("arguments_replace_the_command", &["other", "words"])
            .prints("entrypoint other words\n"),
        configured("another_entrypoint_drops_the_command", &[])
            .with(|setup| setup.entrypoint = Some("/bin/pwd"))
            .prints("/home/alice\n"),
        configured(
            "user_directory_variables_and_volume_are_the_images",
            &["-c", who],
        )
        .with(|setup| setup.entrypoint = Some("sh"))
        .prints(
            "1000:60 /home/alice configured /home/alice\nfrom the image\n1000 755\n1\nwritable\n",
        ),
        configured(
            "flags_win_over_the_image",
            &["-c", "echo $(id -u) $(pwd) $FROM_IMAGE"],
        )
        .with(|setup| {
            setup.entrypoint = Some("sh");
            setup.cwd = Some("/tmp");
        })
        .user("bob", 1001, 50, &[60])
        .env("FROM_IMAGE", "flag")
        .prints("1001 /tmp flag\n"),
        case("the_plain_images_command_is_run", &[])
            .only_hull("a bundle has no image's configuration")
            .prints("no command was given\n"),
    ]
}
