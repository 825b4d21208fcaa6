//! What was made: a table for people, `fleet.json` for programs and for the next run. Field names are an interface.
//! Must not know: how images are made.

use std::fmt::Write;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::FleetError;
use crate::image::Changes;
use crate::units::mib;

/// The report's name in the output directory.
pub const FILE_NAME: &str = "fleet.json";

/// One image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageReport {
    /// `template` or the VM's name.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// The profile that its packages come from; none for the template.
    pub profile: Option<String>,
    /// Its size.
    pub size_bytes: u64,
    /// What it takes on this disk.
    pub allocated_bytes: u64,
    /// Its seed.
    pub seed: u64,
    /// Names everything that shaped it.
    pub recipe: String,
    /// When the image was written last, to notice that somebody else wrote to it.
    pub modified_ns: i128,
    /// What sets it apart from the template; none for the template.
    pub changes: Option<Changes>,
}

/// The whole fleet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FleetReport {
    /// Of this tool's recipes.
    pub tool_version: String,
    /// `packages` or `host`.
    pub source: String,
    /// The fleet's seed.
    pub seed: u64,
    /// The template first, then the VMs.
    pub images: Vec<ImageReport>,
}

impl FleetReport {
    /// The report of an earlier run; an empty one where there is none or it cannot be understood.
    pub fn load(out: &Path) -> FleetReport {
        fs::read(out.join(FILE_NAME)).ok().and_then(|json| serde_json::from_slice(&json).ok()).unwrap_or_default()
    }

    /// Writes `fleet.json`, whole or not at all.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, out: &Path) -> Result<(), FleetError> {
        let (path, part) = (out.join(FILE_NAME), out.join(format!("{FILE_NAME}.part")));
        let json = serde_json::to_vec_pretty(self).map_err(|error| FleetError::File {
            action: "write",
            path: path.clone(),
            source: error.into(),
        })?;
        fs::write(&part, json).map_err(FleetError::file("write", &part))?;
        fs::rename(&part, &path).map_err(FleetError::file("rename", &part))
    }

    /// The image of this name, if it was made by this recipe and nobody has written to it since.
    pub fn reusable(&self, name: &str, recipe: &str) -> Option<&ImageReport> {
        let image = self.images.iter().find(|image| image.name == name && image.recipe == recipe)?;
        let meta = fs::metadata(&image.path).ok()?;
        (meta.len() == image.size_bytes && modified_ns(&meta) == image.modified_ns).then_some(image)
    }

    /// A table, sizes in MiB.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{:<14}{:>8}{:>10}{:>10}{:>10}{:>7}{:>9}{:>8}  MiB ({})\n",
            "image", "size", "on disk", "packages", "upgraded", "data", "deleted", "stale", self.source
        );
        for image in &self.images {
            // Writing to a String cannot fail.
            let _ = write!(text, "{:<14}{:>8}{:>10}", image.name, mib(image.size_bytes), mib(image.allocated_bytes));
            if let Some(c) = &image.changes {
                let _ = write!(text, "{:>10}{:>10}", mib(c.package_bytes), mib(c.upgraded_bytes));
                let _ = write!(text, "{:>7}{:>9}{:>8}", mib(c.data_bytes), mib(c.deleted_bytes), mib(c.stale_bytes));
            }
            text.push('\n');
        }
        text
    }
}

/// When a file was written last, in nanoseconds since 1970.
pub fn modified_ns(meta: &fs::Metadata) -> i128 {
    i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_that_somebody_wrote_to_is_not_reused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.img");
        fs::write(&path, b"image").unwrap();
        let meta = fs::metadata(&path).unwrap();
        let image = ImageReport {
            name: "vm".into(),
            path: path.clone(),
            profile: None,
            size_bytes: 5,
            allocated_bytes: 4096,
            seed: 1,
            recipe: "r1".into(),
            modified_ns: modified_ns(&meta),
            changes: Some(Changes::default()),
        };
        let report = FleetReport { images: vec![image], ..FleetReport::default() };
        report.save(dir.path()).unwrap();
        let loaded = FleetReport::load(dir.path());
        assert_eq!(loaded, report);
        assert!(loaded.reusable("vm", "r1").is_some());
        assert!(loaded.reusable("vm", "r2").is_none());
        fs::write(&path, b"longer image").unwrap();
        assert!(loaded.reusable("vm", "r1").is_none());
        assert!(report.table().contains("vm"));
        fs::write(dir.path().join(FILE_NAME), b"{").unwrap();
        assert_eq!(FleetReport::load(dir.path()), FleetReport::default());
    }
}
