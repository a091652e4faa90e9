//! Who a process runs as: `USER[:GROUP]` looked up in the container's own files.
//!
//! Owns: reading /etc/passwd and /etc/group as engines do, first match wins. Refuses: files that
//! aren't plain, more than 1 MiB of them, and names that are in neither.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags};

use crate::fault::Fault;
use crate::spec::User;

/// Most bytes of a passwd or group file that are read.
const MAX_FILE: u64 = 1024 * 1024;

/// Largest id that can be named by its number, as engines have it.
const MAX_ID: u32 = i32::MAX as u32;

/// What a process's user came to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Identity {
    /// User id.
    pub(crate) uid: u32,
    /// Group id.
    pub(crate) gid: u32,
    /// Supplementary group ids.
    pub(crate) groups: Vec<u32>,
    /// Home directory, if the user has an entry.
    pub(crate) home: Option<String>,
}

/// An entry of /etc/passwd.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

/// An entry of /etc/group.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

/// Finds out who `user` is in the root directory this process is in.
///
/// # Errors
/// Refuses names without an entry and ids out of range.
pub(crate) fn identify(user: &User) -> Result<Identity, Fault> {
    let passwd = read_capped(Path::new("/etc/passwd"));
    let name = user.username.as_deref().unwrap_or("");
    let mut identity = if name.is_empty() {
        Identity {
            uid: user.uid,
            gid: user.gid,
            groups: Vec::new(),
            home: home_of(user.uid, &passwd),
        }
    } else {
        resolve(name, &passwd, &read_capped(Path::new("/etc/group")))?
    };
    identity.groups.extend(&user.additional_gids);
    Ok(identity)
}

/// The text of a file in the container, or nothing if it isn't a plain file that can be read.
fn read_capped(path: &Path) -> String {
    let mut bytes = Vec::new();
    if let Some(file) = open_plain(path) {
        let _ = File::from(file).take(MAX_FILE).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn open_plain(path: &Path) -> Option<OwnedFd> {
    // Not blocking: a FIFO in its place must not hold the start.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = rustix::fs::open(path, flags, Mode::empty()).ok()?;
    let mode = rustix::fs::fstat(&file).ok()?.st_mode;
    (FileType::from_raw_mode(mode) == FileType::RegularFile).then_some(file)
}

fn accounts(passwd: &str) -> impl Iterator<Item = Account<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        let name = fields.next()?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = fields.nth(1).unwrap_or("");
        Some(Account {
            name,
            uid,
            gid,
            home,
        })
    })
}

fn groups(group: &str) -> impl Iterator<Item = Group<'_>> {
    group.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        let name = fields.next()?;
        let gid = fields.nth(1)?.parse().ok()?;
        let members = fields.next().unwrap_or("");
        Some(Group { name, gid, members })
    })
}

fn home_of(uid: u32, passwd: &str) -> Option<String> {
    let account = accounts(passwd).find(|account| account.uid == uid)?;
    Some(account.home.to_owned())
}

/// `USER[:GROUP]`, each a name or a number, by these files.
fn resolve(wanted: &str, passwd: &str, group: &str) -> Result<Identity, Fault> {
    let (user, group_wanted) = wanted.split_once(':').unwrap_or((wanted, ""));
    let number: Option<u32> = user.parse().ok();
    let account = accounts(passwd).find(|account| match number {
        _ if user.is_empty() => account.uid == 0,
        Some(uid) => account.uid == uid,
        None => account.name == user,
    });
    let mut identity = match (&account, number) {
        (Some(account), _) => Identity {
            uid: account.uid,
            gid: account.gid,
            groups: Vec::new(),
            home: Some(account.home.to_owned()),
        },
        (None, Some(uid)) => Identity {
            uid: in_range(uid)?,
            ..Identity::default()
        },
        (None, None) if user.is_empty() => Identity::default(),
        (None, None) => {
            return Err(Fault::refused(format!(
                "unable to find user {user}: no matching entries in passwd file"
            )));
        }
    };
    if !group_wanted.is_empty() {
        identity.gid = resolve_group(group_wanted, group)?;
    } else if let Some(account) = account {
        identity.groups = groups(group)
            .filter(|group| group.members.split(',').any(|name| name == account.name))
            .map(|group| group.gid)
            .collect();
    }
    Ok(identity)
}

fn resolve_group(wanted: &str, group: &str) -> Result<u32, Fault> {
    let number: Option<u32> = wanted.parse().ok();
    let found = groups(group).find(|group| match number {
        Some(gid) => group.gid == gid,
        None => group.name == wanted,
    });
    match (found, number) {
        (Some(group), _) => Ok(group.gid),
        (None, Some(gid)) => in_range(gid),
        (None, None) => Err(Fault::refused(format!(
            "unable to find group {wanted}: no matching entries in group file"
        ))),
    }
}

fn in_range(id: u32) -> Result<u32, Fault> {
    if id > MAX_ID {
        return Err(Fault::refused(
            "uids and gids must be in range 0-2147483647",
        ));
    }
    Ok(id)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\
        # a remark\n\
        broken\n\
        app:x:1000:1001:App,,,:/home/app:/bin/sh\n\
        app:x:2000:2000::/second:/bin/sh\n\
        short:x:7:8";
    const GROUP: &str = "root:x:0:\nstaff:x:50:app,other\naudio:x:63:other,app\napp:x:1001:\nx:y\n";

    fn who(name: &str) -> Result<(u32, u32, Vec<u32>), String> {
        resolve(name, PASSWD, GROUP)
            .map(|identity| (identity.uid, identity.gid, identity.groups))
            .map_err(|fault| fault.to_string())
    }

    #[test]
    fn a_name_brings_its_groups_and_home() {
        assert_eq!(who("app"), Ok((1000, 1001, vec![50, 63])));
        let home = resolve("app", PASSWD, GROUP).unwrap().home;
        assert_eq!(home.as_deref(), Some("/home/app"));
    }

    #[test]
    fn a_named_group_stands_alone() {
        assert_eq!(who("app:staff"), Ok((1000, 50, vec![])));
        assert_eq!(who("app:9"), Ok((1000, 9, vec![])));
        assert_eq!(who(":staff"), Ok((0, 50, vec![])));
    }

    #[test]
    fn a_number_needs_no_entry() {
        assert_eq!(who("4711"), Ok((4711, 0, vec![])));
        assert_eq!(who("4711:12"), Ok((4711, 12, vec![])));
        assert_eq!(who("1000"), Ok((1000, 1001, vec![50, 63])));
        assert_eq!(who("7"), Ok((7, 8, vec![])));
    }

    #[test]
    fn the_unknown_is_refused_in_the_engines_words() {
        assert_eq!(
            who("bob").unwrap_err(),
            "unable to find user bob: no matching entries in passwd file"
        );
        assert_eq!(
            who("app:crew").unwrap_err(),
            "unable to find group crew: no matching entries in group file"
        );
        assert!(who("3000000000").unwrap_err().contains("in range"));
    }

    proptest! {
        #[test]
        fn any_files_and_any_name_end(name in ".{0,20}", passwd in "[a-z0-9:\\n,]{0,200}", group in ".{0,200}") {
            let _ = resolve(&name, &passwd, &group);
        }

        #[test]
        fn a_number_is_that_user(uid in 0..=MAX_ID, passwd in "[a-z0-9:\\n]{0,200}") {
            prop_assert_eq!(resolve(&uid.to_string(), &passwd, "").unwrap().uid, uid);
        }
    }
}
