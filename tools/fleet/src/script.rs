//! Changes to a file system as a debugfs script. Pure. Must not know: what is changed and why.

use std::collections::BTreeSet;
use std::fmt::{self, Write};
use std::path::Path;

/// Collects changes and writes them as debugfs commands, making the directories that are missing.
///
/// Every command names something in the current directory: several of them mistake the parent of a path like `/name`
/// for the current directory, and `write` takes no path at all.
#[derive(Debug)]
pub struct Script {
    text: String,
    dirs: BTreeSet<String>,
    current: String,
}

impl Script {
    /// A script for a file system that has these directories (relative to its root).
    pub fn new(dirs: impl IntoIterator<Item = String>) -> Script {
        Script { text: String::new(), dirs: dirs.into_iter().collect(), current: String::new() }
    }

    /// Makes a directory and its parents, where missing.
    pub fn make_dir(&mut self, path: &str) {
        if path.is_empty() || self.dirs.contains(path) {
            return;
        }
        let name = self.go_beside(path);
        self.line(format_args!("mkdir \"{name}\""));
        self.dirs.insert(path.to_owned());
    }

    /// Copies the file `source` of this machine to a new file. The source's path must be plain (see `tree`).
    pub fn write(&mut self, source: &Path, path: &str) {
        let name = self.go_beside(path);
        self.line(format_args!("write \"{}\" \"{name}\"", source.display()));
    }

    /// Makes a symbolic link.
    pub fn link(&mut self, path: &str, target: &str) {
        let name = self.go_beside(path);
        self.line(format_args!("symlink \"{name}\" \"{target}\""));
    }

    /// Replaces a file as dpkg does: the new one is written beside it, then takes its name.
    pub fn replace(&mut self, source: &Path, path: &str) {
        self.write(source, &format!("{path}.dpkg-new"));
        self.remove(path);
        let name = self.go_beside(path);
        // The two adjust no link count, so that together they rename.
        self.line(format_args!("ln \"{name}.dpkg-new\" \"{name}\""));
        self.line(format_args!("unlink \"{name}.dpkg-new\""));
    }

    /// Removes a file; its blocks are freed and keep their bytes.
    pub fn remove(&mut self, path: &str) {
        let name = self.go_beside(path);
        self.line(format_args!("rm \"{name}\""));
    }

    /// The commands, one a line.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Goes to the directory of `path`, made if missing; returns the name in it.
    fn go_beside<'a>(&mut self, path: &'a str) -> &'a str {
        let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
        self.make_dir(dir);
        if self.current != dir {
            self.line(format_args!("cd \"/{dir}\""));
            self.current = dir.to_owned();
        }
        name
    }

    fn line(&mut self, line: fmt::Arguments<'_>) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.text, "{line}");
    }
}

/// The directory that a path is in; empty for the root.
pub fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(dir, _)| dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_directories_are_made_once() {
        let mut script = Script::new(["var".to_owned()]);
        script.write(Path::new("/s/1"), "var/log/app/x y.log");
        script.link("var/log/latest", "app/x y.log");
        script.replace(Path::new("/s/2"), "top");
        script.remove("var/old");
        script.write(Path::new("/s/3"), "home/x");
        let expected = [
            r#"cd "/var""#,
            r#"mkdir "log""#,
            r#"cd "/var/log""#,
            r#"mkdir "app""#,
            r#"cd "/var/log/app""#,
            r#"write "/s/1" "x y.log""#,
            r#"cd "/var/log""#,
            r#"symlink "latest" "app/x y.log""#,
            r#"cd "/""#,
            r#"write "/s/2" "top.dpkg-new""#,
            r#"rm "top""#,
            r#"ln "top.dpkg-new" "top""#,
            r#"unlink "top.dpkg-new""#,
            r#"cd "/var""#,
            r#"rm "old""#,
            r#"cd "/""#,
            r#"mkdir "home""#,
            r#"cd "/home""#,
            r#"write "/s/3" "x""#,
        ];
        assert_eq!(script.text().lines().collect::<Vec<_>>(), expected);
    }
}
