"""The suite needs nothing here: the plugin is installed. `pytester` serves the project's own tests."""

pytest_plugins = ["pytester"]
