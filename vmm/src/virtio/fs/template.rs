//! The mount of a guest that is to be copied: it holds for other directories of the same names.
//!
//! Owns: what of it is saved, and how a copy's device takes it over. Refuses to save a guest that
//! knows a file below an export, and to take over what the copy's own exports don't bear out: a
//! name that isn't there, another number of it, terms that they don't offer.
//!
//! Of an export's directory the guest has kept no attributes ([`Tree::believed`]), so it asks for
//! those of the copy's.

use serde::{Deserialize, Serialize};

use super::dax::Dax;
use super::tree::{State, Terms, Tree};
use crate::virtio::device::Unsaveable;

/// What a guest that is to be copied knows of what it has mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateMount {
    terms: Terms,
    /// The exports that it has looked up, with their numbers.
    known: Vec<(String, u64)>,
}

impl Terms {
    /// Whether nothing is promised that isn't among what is `offered`.
    fn are_within(self, offered: Self) -> bool {
        let pairs = [
            (self.no_open, offered.no_open),
            (self.no_opendir, offered.no_opendir),
            (self.ours_alone, offered.ours_alone),
        ];
        pairs
            .iter()
            .all(|(promised, offered)| !promised || *offered)
    }
}

impl Tree {
    /// What the guest knows, which are names alone.
    pub(super) fn save_template(
        &self,
        state: &State,
        terms: Terms,
    ) -> Result<TemplateMount, Unsaveable> {
        let in_use = |what: &str| Err(Unsaveable(format!("{what} of its shares is in use")));
        let exports = self.exports();
        let mut known = Vec::new();
        for (id, node) in state.nodes.all().0 {
            match exports.iter().flatten().find(|export| export.root == id) {
                Some(export) if node.lookups > 0 => {
                    known.extend(export.names.iter().map(|name| (name.clone(), id)));
                }
                Some(_) => {}
                None => return in_use("a file"),
            }
        }
        if state.files.all().0.next().is_some() {
            return in_use("an open file");
        }
        let shown = state.dax.as_ref().map(Dax::all);
        if shown.is_some_and(|shown| !shown.is_empty()) {
            return in_use("a part of a file");
        }
        known.sort();
        Ok(TemplateMount { terms, known })
    }

    /// Has what the guest knows be of the exports that there are, or says what stands against it.
    pub(super) fn take_over(&self, saved: &TemplateMount) -> Result<(), String> {
        if !saved.terms.are_within(self.offered()) {
            return Err("it was promised more than holds for what is shown".to_owned());
        }
        let exports = self.exports();
        for (name, number) in &saved.known {
            match exports.iter().flatten().find(|export| export.has(name)) {
                Some(export) if export.root == *number => {}
                Some(_) => return Err(format!("\"{name}\" had another number")),
                None => return Err(format!("it knows \"{name}\", which isn't shown")),
            }
        }
        drop(exports);
        self.unmount();
        self.lock().terms = Some(saved.terms);
        Ok(())
    }
}
