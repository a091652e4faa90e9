//! Capabilities as people add and drop them: over Docker's fourteen.

use std::collections::HashSet;

use oci_spec::runtime::{Capabilities, Capability};

use super::PlanError;

/// What a container of Docker's may do (moby, `oci/caps/defaults.go`).
const DEFAULT: [Capability; 14] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fsetid,
    Capability::Fowner,
    Capability::Mknod,
    Capability::NetRaw,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setfcap,
    Capability::Setpcap,
    Capability::NetBindService,
    Capability::SysChroot,
    Capability::Kill,
    Capability::AuditWrite,
];

/// capabilities(7), in the order of their numbers.
const ALL: [Capability; 41] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setpcap,
    Capability::LinuxImmutable,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetAdmin,
    Capability::NetRaw,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::SysModule,
    Capability::SysRawio,
    Capability::SysChroot,
    Capability::SysPtrace,
    Capability::SysPacct,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysNice,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Mknod,
    Capability::Lease,
    Capability::AuditWrite,
    Capability::AuditControl,
    Capability::Setfcap,
    Capability::MacOverride,
    Capability::MacAdmin,
    Capability::Syslog,
    Capability::WakeAlarm,
    Capability::BlockSuspend,
    Capability::AuditRead,
    Capability::Perfmon,
    Capability::Bpf,
    Capability::CheckpointRestore,
];

/// Every capability.
pub(super) fn all() -> Capabilities {
    ALL.into_iter().collect()
}

/// Docker's rule: `ALL` on one side is the base that the other side changes; without it, the
/// default is.
pub(super) fn resolve(add: &[String], drop: &[String]) -> Result<Capabilities, PlanError> {
    let (add_all, add) = read(add)?;
    let (drop_all, drop) = read(drop)?;
    let base: HashSet<Capability> = match (add_all, drop_all) {
        (true, _) => all(),
        (false, true) => return Ok(add),
        (false, false) => DEFAULT.into_iter().collect(),
    };
    Ok(base
        .union(&add)
        .filter(|capability| !drop.contains(capability))
        .copied()
        .collect())
}

fn read(names: &[String]) -> Result<(bool, Capabilities), PlanError> {
    let mut all = false;
    let mut named = Capabilities::new();
    for name in names {
        let upper = name.trim().to_ascii_uppercase();
        if upper == "ALL" {
            all = true;
            continue;
        }
        let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
        let capability = bare
            .parse()
            .map_err(|_| PlanError::Capability(name.clone()))?;
        named.insert(capability);
    }
    Ok((all, named))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(add: &[&str], drop: &[&str]) -> Capabilities {
        let own = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        resolve(&own(add), &own(drop)).unwrap()
    }

    #[test]
    fn adding_and_dropping() {
        assert_eq!(resolved(&[], &[]).len(), 14);
        assert!(resolved(&["net_admin"], &[]).contains(&Capability::NetAdmin));
        assert!(!resolved(&[], &["CAP_CHOWN"]).contains(&Capability::Chown));
        assert_eq!(resolved(&["ALL"], &["SYS_ADMIN"]).len(), 40);
        assert_eq!(
            resolved(&["CHOWN"], &["all"]),
            [Capability::Chown].into_iter().collect()
        );
        assert!(matches!(
            resolve(&["FLY".into()], &[]),
            Err(PlanError::Capability(name)) if name == "FLY"
        ));
    }
}
