"""SGLang's models with a read-out that can be switched: for SGLANG_EXTERNAL_MODEL_PACKAGE.

SGLang goes through the modules of that package, and a class in an `EntryClass` takes the place of
its own model for the architecture of that name.
"""
